"""Every form of checkpoint gives the weights that were written, and nothing that a file names is run."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import nn

from rslp.errors import CheckpointError
from rslp.helios.checkpoint import distributed, load_encoder, open_checkpoint
from rslp.helios.model import Helios
from tests.helios import tiny_helios as tiny

NANO = Path(__file__).parents[2] / "../shared/data/helios-dcp-nano"
ENCODER = ("encoder",)


def encoder_of(path: Path | str, **kwargs: Any) -> nn.Module:
    return load_encoder(open_checkpoint(str(path)), ENCODER, **kwargs)


def same_weights(module: nn.Module, reference: dict[str, torch.Tensor], prefix: str = "encoder.") -> bool:
    own = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    wanted = {name: tensor for name, tensor in reference.items() if name.startswith(prefix)}
    return own.keys() == wanted.keys() and all(torch.equal(own[name], wanted[name]) for name in own)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny.write_bundle(tmp_path / "bundle", seed=1)


def reference(seed: int = 1) -> dict[str, torch.Tensor]:
    return tiny.build(tiny.config(), seed).state_dict()


def edit_weights(bundle: Path, change: Any) -> None:
    weights = torch.load(bundle / "weights.pth")
    change(weights)
    torch.save(weights, bundle / "weights.pth")


class Joint(nn.Module):
    """A joint model as far as the encoder's place in it goes: `model.encoder.0`."""

    def __init__(self, encoder: Helios) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.encoder = nn.ModuleList([encoder])
        self.model.head = nn.Linear(2, 2)


def write_last(path: Path, joint: Joint, *, architecture: bool, **extra: Any) -> Path:
    state = {k: v for k, v in joint.state_dict().items() if architecture or not k.endswith("_extra_state")}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "epoch": 3, **extra}, path)
    return path


# The forms


def test_bundle(bundle: Path) -> None:
    assert same_weights(encoder_of(bundle), reference())


@pytest.mark.parametrize("keep", ["encoder.", ""])
def test_a_bundle_with_the_weights_of_the_encoder_alone(bundle: Path, keep: str) -> None:
    def only_encoder(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            tensor = weights.pop(name)
            if name.startswith("encoder."):
                weights[keep + name.removeprefix("encoder.")] = tensor

    edit_weights(bundle, only_encoder)
    assert same_weights(encoder_of(bundle), reference())


def test_random_initialization_needs_no_weights_and_takes_none(bundle: Path) -> None:
    assert not same_weights(encoder_of(bundle, random_initialization=True), reference())
    (bundle / "weights.pth").unlink()
    assert encoder_of(bundle, random_initialization=True).embedding_size == tiny.EMBEDDING
    with pytest.raises(CheckpointError, match=r"no weights\.pth beside config\.json"):
        encoder_of(bundle)


@pytest.mark.parametrize("package", ["helios", "olmoearth_pretrain"])
def test_distributed(tmp_path: Path, package: str) -> None:
    folder = tiny.write_distributed(tmp_path / "step1", tiny.config(package), seed=1)
    assert b"olmo_core" in (folder / "model_and_optim/.metadata").read_bytes()
    assert same_weights(encoder_of(folder), reference())


def test_other_selectors(tmp_path: Path) -> None:
    folder = tiny.write_distributed(tmp_path / "step1", seed=1)
    target = load_encoder(open_checkpoint(str(folder)), ["target_encoder"])
    assert same_weights(target, reference(), "target_encoder.")
    block = load_encoder(open_checkpoint(str(folder)), ["encoder", "blocks", 1])
    assert same_weights(block, reference(), "encoder.blocks.1.")
    with pytest.raises(CheckpointError, match=r"selector \['encoder', 'legs'\] leads nowhere, Encoder has no 'legs'"):
        load_encoder(open_checkpoint(str(folder)), ["encoder", "legs"])


@pytest.mark.skipif(not NANO.is_dir(), reason="no test data beside the checkout")
@pytest.mark.parametrize("name", ["config.json", "config.helios.json"])
def test_a_checkpoint_written_by_pre_training(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_and_optim").symlink_to((NANO / "model_and_optim").resolve())
    shutil.copy(NANO / name, tmp_path / "config.json")
    assert same_weights(encoder_of(tmp_path), torch.load(NANO / "ref.pth"))


@pytest.mark.parametrize("at", ["", "checkpoints", "checkpoints/last.ckpt"])
def test_a_run_of_ours_knows_its_architecture(tmp_path: Path, bundle: Path, at: str) -> None:
    joint = Joint(Helios(str(bundle), patch_size=4))
    run = tmp_path / "elsewhere/run"
    write_last(run / "checkpoints/last.ckpt", joint, architecture=True)
    shutil.rmtree(bundle)
    assert same_weights(encoder_of(run / at), reference())
    again = Helios(str(run / at), patch_size=4)
    assert [m.name for m in again.modalities] == ["sentinel2_l2a", "sentinel1", "landsat"]


def test_a_run_of_the_original_takes_the_config_beside_it(tmp_path: Path, bundle: Path) -> None:
    file = write_last(tmp_path / "old/last.ckpt", Joint(Helios(str(bundle), patch_size=4)), architecture=False)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: .*put the config\.json of the pre-trained model beside"):
        encoder_of(file)
    shutil.copy(bundle / "config.json", file.parent)
    assert same_weights(encoder_of(file.parent), reference())


def test_a_run_of_the_original_follows_its_run_config(tmp_path: Path, bundle: Path) -> None:
    encoder = {"class_path": "rslp.helios.model.Helios", "init_args": {"checkpoint_path": "../../bundle"}}
    config = {"model": {"init_args": {"model": {"init_args": {"encoder": [encoder]}}}}}
    file = write_last(
        tmp_path / "old/run/checkpoints/last.ckpt", Joint(Helios(str(bundle), patch_size=4)), architecture=False
    )
    (tmp_path / "old/run/config.yaml").write_text(json.dumps(config))
    assert same_weights(encoder_of(file.parents[1]), reference())
    shutil.rmtree(bundle)
    with pytest.raises(CheckpointError, match=r"bundle, named there \(checkpoint .*bundle: no such file"):
        encoder_of(file)


def test_checkpoints_with_and_without_the_architecture_load_strictly(bundle: Path) -> None:
    joint = Joint(Helios(str(bundle), patch_size=4, random_initialization=True))
    state = Joint(Helios(str(bundle), patch_size=4)).state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    joint.load_state_dict(state, strict=True)
    assert same_weights(joint.model.encoder[0].model, reference())
    del state["model.encoder.0._extra_state"]
    joint.load_state_dict(state, strict=True)
    del state["model.encoder.0.model.norm.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        joint.load_state_dict(state, strict=True)


def test_a_checkpoint_with_objects_of_foreign_classes(tmp_path: Path, bundle: Path) -> None:
    joint = Joint(Helios(str(bundle), patch_size=4))
    hyper = {"args": argparse.Namespace(lr=1.0), "path": Path("x")}
    file = write_last(tmp_path / "last.ckpt", joint, architecture=True, hyper_parameters=hyper)
    assert same_weights(encoder_of(file), reference())


def test_a_published_model_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("allenai/OlmoEarth-v1-Nano", "OlmoEarth-v1-Nano", "OLMOEARTH_V1_NANO"):
        with pytest.raises(
            CheckpointError, match=r"^checkpoint allenai/OlmoEarth-v1-Nano: can't be downloaded"
        ) as error:
            open_checkpoint(name)
        assert "\n" not in str(error.value)


# Safety


def poison(folder: Path, bomb: object) -> None:
    index = folder / "model_and_optim/.metadata"
    index.write_bytes(pickle.dumps([bomb, pickle.loads(pickle.dumps({}))]))


@pytest.mark.parametrize("call", [os.system, eval, torch.hub.load_state_dict_from_url, os.mkdir])
def test_an_index_that_names_anything_else_is_refused(tmp_path: Path, call: Any) -> None:
    folder = tiny.write_distributed(tmp_path / "step1")
    witness = tmp_path / "witness"
    poison(folder, tiny.Bomb(call, str(witness) if call is os.mkdir else f"open({str(witness)!r}, 'w')"))
    with pytest.raises(CheckpointError, match="which is no part of an index"):
        encoder_of(folder)
    assert not witness.exists()


class _OldPickler(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_an_index_of_an_older_python(tmp_path: Path) -> None:
    folder = tiny.write_distributed(tmp_path / "step1")
    wanted = encoder_of(folder).state_dict()
    path = folder / "model_and_optim/.metadata"
    with path.open("rb") as file:
        index = distributed._IndexUnpickler(file).load()
    stream = io.BytesIO()
    _OldPickler(stream).dump(index)
    assert b"getattr" in stream.getvalue()
    path.write_bytes(stream.getvalue())
    got = encoder_of(folder).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_getattr_of_an_index_is_for_enumerations_alone(tmp_path: Path) -> None:
    folder = tiny.write_distributed(tmp_path / "step1")

    class Asks:
        def __reduce__(self) -> Any:
            return getattr, (torch.Size, "numel")

    (folder / "model_and_optim/.metadata").write_bytes(pickle.dumps(Asks()))
    with pytest.raises(CheckpointError, match="no part of an index"):
        encoder_of(folder)


def test_a_function_that_a_file_of_weights_names_is_not_called(bundle: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    torch.save({"state_dict": reference(), "bomb": tiny.Bomb(tiny.explode, str(witness))}, bundle / "weights.pth")
    assert same_weights(encoder_of(bundle), reference())
    assert not witness.exists()
    torch.load(bundle / "weights.pth", weights_only=False)
    assert witness.exists()


def test_a_file_of_weights_that_names_the_system_is_refused(bundle: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    torch.save({"state_dict": reference(), "bomb": tiny.Bomb(os.mkdir, str(witness))}, bundle / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth: holds more than tensors: .*posix\.mkdir"):
        encoder_of(bundle)
    assert not witness.exists()


def test_a_checkpoint_without_an_encoder(bundle: Path) -> None:
    torch.save({"state_dict": reference()}, bundle / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"no weights named model\.encoder\.0\.model\.\*, but decoder\.blocks"):
        encoder_of(bundle / "last.ckpt")


# What does not fit


def test_missing_and_unexpected_weights_are_listed(bundle: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["encoder.bogus"] = torch.zeros(1)
        del weights["encoder.norm.weight"], weights["encoder.norm.bias"]

    edit_weights(bundle, change)
    with pytest.raises(CheckpointError, match=r"2 missing: norm\.weight, norm\.bias; 1 unexpected: bogus"):
        encoder_of(bundle)
    loaded = encoder_of(bundle, strict=False).state_dict()
    assert torch.equal(loaded["blocks.0.attn.q.weight"], reference()["encoder.blocks.0.attn.q.weight"])


def test_weights_of_another_shape_are_never_taken(bundle: Path) -> None:
    edit_weights(bundle, lambda weights: weights.update({"encoder.norm.weight": torch.zeros(17)}))
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"1 of another shape: norm\.weight \(checkpoint 17, model 16\)"):
            encoder_of(bundle, strict=strict)


def test_many_faults_are_counted(bundle: Path) -> None:
    edit_weights(bundle, lambda weights: [weights.pop(name) for name in list(weights) if "blocks" in name])
    with pytest.raises(CheckpointError, match=r"\d\d missing: .*, and \d\d more$"):
        encoder_of(bundle)


def test_a_table_that_is_computed_today_is_no_unexpected_weight(bundle: Path) -> None:
    name = "encoder.composite_encodings.pos_embed"
    edit_weights(bundle, lambda weights: weights.update({name: torch.zeros(12, 4)}))
    assert same_weights(encoder_of(bundle), reference())


def test_options_of_the_old_days(tmp_path: Path) -> None:
    content = tiny.config("helios")
    encoder = content["model"]["encoder_config"]
    encoder |= {"use_flash_attn": True, "an_old_option": 1}
    bundle = tiny.write_bundle(tmp_path, tiny.config(), seed=1)
    tiny.write_config(bundle, content)
    loaded = encoder_of(bundle)
    assert same_weights(loaded, reference())
    assert not loaded.use_flash_attn


@pytest.mark.parametrize("kind", ["bundle", "distributed"])
def test_flipped_bits_of_weights_and_of_their_index_are_noticed_or_mean_the_same(tmp_path: Path, kind: str) -> None:
    folder = (tiny.write_bundle if kind == "bundle" else tiny.write_distributed)(tmp_path / "step1")
    sound, rng = encoder_of(folder).state_dict(), random.Random(0)
    noticed = 0
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "config.json"):
        raw = file.read_bytes()
        for _ in range(12):
            damaged = bytearray(raw)
            damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            try:
                assert same_weights(encoder_of(folder), sound, prefix="")
            except CheckpointError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
                noticed += 1
        file.write_bytes(raw)
    assert noticed >= 6


def test_an_index_that_leaves_a_part_of_a_tensor_out(tmp_path: Path) -> None:
    folder = tiny.write_distributed(tmp_path / "step1")
    path = folder / "model_and_optim/.metadata"
    for spoil in (leave_out_chunk, lead_to_another):
        index = distributed._IndexUnpickler(io.BytesIO(path.read_bytes())).load()
        spoil(index)
        spoilt = tmp_path / spoil.__name__
        shutil.copytree(folder, spoilt)
        (spoilt / "model_and_optim/.metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            encoder_of(spoilt)


def leave_out_chunk(index: Any) -> None:
    next(entry for name, entry in index.state_dict_metadata.items() if name.startswith("model.encoder.")).chunks.clear()


def lead_to_another(index: Any) -> None:
    one, other = [key for key in index.storage_data if key.fqn.startswith("model.encoder.")][:2]
    index.storage_data[one] = index.storage_data[other]


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = tiny.write_distributed(tmp_path / "step1")
    shard = next((folder / "model_and_optim").glob("*.distcp"))
    os.truncate(shard, 100)
    with pytest.raises(CheckpointError, match="model_and_optim: damaged or incomplete"):
        encoder_of(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match="model_and_optim: damaged or incomplete"):
        encoder_of(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither config.json with weights.pth, nor config.json with model_and_optim/"),
        ({"config.json": "{", "weights.pth": "x"}, "config.json: cannot be read"),
        ({"config.json": "{}", "weights.pth": "x"}, "no `model` section"),
        ({"config.json": '{"model": {"_CLASS_": "a.B"}}', "weights.pth": "x"}, "does not build a Helios model"),
        ({"last.ckpt": "this is text"}, "last.ckpt: "),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError) as error:
        encoder_of(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/such/place", "checkpoint no/such/place: no such file or folder$"),
        ("/no/OlmoEarth-v1-Nano", "no such file or folder; for the published model write allenai/OlmoEarth-v1-Nano$"),
        ("gs://bucket/step1", "remote checkpoints can't be read; copy it"),
    ],
)
def test_paths_that_lead_nowhere(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
