"""Learning rates by depth, warm-up, and how both go with schedulers, thaws and kills."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rslp.errors import ConfigError
from rslp.models import optim
from rslp.models.optim import LayerwiseAdamW, depths_of, use_foreach

ENCODER = "model.encoder.0.model.encoder."


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        # as Helios names its parts
        (
            ["patch_embeddings.x.proj.weight", "composite_encodings.month_embed.weight", "blocks.0.norm1.weight",
             "blocks.11.attn.q.bias", "norm.weight", "project_and_aggregate.projection.0.bias"],
            [0, 0, 1, 12, 13, 13],
        ),
        # Galileo
        (["s_t_embed.weight", "month_embed.weight", "blocks.1.mlp.fc1.weight", "norm.bias"], [0, 0, 2, 3]),
        (["layers.0.weight", "layers.2.bias", "head.weight"], [1, 3, 4]),
        (["conv.weight"], [0]),
    ],
)  # fmt: skip
def test_a_parameters_depth_is_read_off_its_name(names: list[str], depths: list[int]) -> None:
    found, top = depths_of([ENCODER + name for name in names] + ["model.decoders.crops.0.blocks.3.weight"])
    assert found == {ENCODER + name: depth for name, depth in zip(names, depths, strict=True)}
    assert top == (0 if set(depths) == {0} else max(depths))


class Toy(L.LightningModule):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        part = torch.nn.Module()
        part.embed, part.norm = torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)
        part.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(blocks))
        self.model = torch.nn.ModuleDict({"encoder": torch.nn.ModuleList([part]), "decoders": torch.nn.Linear(2, 1)})


def rates(optimizer: torch.optim.Optimizer, module: torch.nn.Module) -> dict[str, float]:
    of = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: of[parameter] for name, parameter in module.named_parameters()}


@given(st.integers(1, 5), st.floats(0.1, 1.0), st.floats(0.01, 2.0))
def test_rates_follow_the_formula(blocks: int, decay: float, factor: float) -> None:
    module = Toy(blocks)
    found = rates(LayerwiseAdamW(lr=0.1, layer_decay=decay, encoder_lr_factor=factor).build(module), module)
    for name, rate in found.items():
        *_, part, number, _ = ["", *name.split(".")]
        depth = {"embed": 0, "norm": blocks + 1}.get(number) if "encoder" in name else None
        depth = 1 + int(number) if part == "blocks" else depth
        expected = 0.1 if depth is None else 0.1 * factor * decay ** (blocks + 1 - depth)
        assert rate == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"lr": 0.0}, "lr"), ({"encoder_lr_factor": 0.0}, "encoder_lr_factor"), ({"layer_decay": 1.5}, "layer_decay"),
     ({"warmup_steps": -1}, "warmup_steps")],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer\.init_args\.{key}: got "):
        LayerwiseAdamW(**settings)


def test_layers_of_an_encoder_without_any_cannot_decay() -> None:
    module = Toy()
    del module.model["encoder"][0].blocks, module.model["encoder"][0].norm  # type: ignore[union-attr, index]
    with pytest.raises(ConfigError, match="no numbered blocks"):
        LayerwiseAdamW(layer_decay=0.5).build(module)


def test_warm_up_is_the_formula_by_group_and_waits_for_the_thaw() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [{"params": [p], "warmup_steps": w} for p, w in zip(parameters, (4, 2, 0), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    optim.attach_warmup(optimizer)
    parameters[1].requires_grad = False
    moved: list[list[float]] = []
    for step in range(6):
        if step == 3:
            parameters[1].requires_grad = True
        before = [p.item() for p in parameters]
        for parameter in parameters:
            parameter.grad = torch.ones(1) if parameter.requires_grad else None
        optimizer.step()
        moved.append([b - p.item() for b, p in zip(before, parameters, strict=True)])
        assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0, 1.0]
    by_group = list(zip(*moved, strict=True))
    assert by_group[0] == pytest.approx((0.25, 0.5, 0.75, 1.0, 1.0, 1.0))
    assert by_group[1] == pytest.approx((0.0, 0.0, 0.0, 0.5, 1.0, 1.0))
    assert by_group[2] == pytest.approx((1.0,) * 6)


def test_warm_up_goes_on_from_a_checkpoint_and_with_a_scheduler() -> None:
    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([{"params": [parameter], "warmup_steps": 4}], lr=1.0)
        optim.attach_warmup(optimizer)
        return parameter, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], gamma=0.5)

    def moves(of: tuple[Any, Any, Any], steps: int) -> list[float]:
        parameter, optimizer, scheduler = of
        found = []
        for _ in range(steps):
            before = parameter.item()
            parameter.grad = torch.ones(1)
            optimizer.step()
            scheduler.step()
            found.append(before - parameter.item())
        return found

    one = made()
    head = moves(one, 2)
    two = made()
    two[1].load_state_dict(copy.deepcopy(one[1].state_dict()))
    two[2].load_state_dict(copy.deepcopy(one[2].state_dict()))
    assert [*head, *moves(two, 3)] == pytest.approx([0.25, 0.5, 0.75, 0.5, 0.5])


def test_without_warm_up_nothing_is_hooked_in() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    optim.attach_warmup(optimizer)
    assert set(optimizer.param_groups[0]).isdisjoint({"warmup_steps", "warmup_done"})


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_parameters_that_step_together_get_the_same_bits(kind: Any) -> None:
    def trained(*, at_once: bool) -> list[torch.Tensor]:
        draws = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=draws)) for shape in ((64, 33), (7,), (3, 5, 2))]
        groups = [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.01}]
        optimizer = kind(groups, weight_decay=0.1)
        if at_once:
            use_foreach(optimizer)
            assert all(group["foreach"] for group in optimizer.param_groups)
        for step in range(5):
            for number, parameter in enumerate(parameters):  # one of them is frozen at first
                frozen = number == 1 and step < 2
                parameter.grad = None if frozen else torch.randn(parameter.shape, generator=draws)
            optimizer.step()
        return parameters

    for ours, plain in zip(trained(at_once=True), trained(at_once=False), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("chosen", [{"foreach": False}, {"fused": True}])
def test_what_a_person_chose_of_an_optimiser_stays(chosen: dict[str, bool]) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], **chosen)
    use_foreach(optimizer)
    assert {name: optimizer.param_groups[0][name] for name in chosen} == chosen
    assert not optimizer.param_groups[0]["foreach"]
