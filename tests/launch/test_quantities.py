"""Amounts as people write them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from rslp.errors import UsageError
from rslp.launch.job import Mount, parse_duration, parse_memory, parse_mounts, parse_pairs


@pytest.mark.parametrize(
    ("text", "mebibytes"), [("512MiB", 512), ("64GiB", 65536), ("64 GB", 65536), ("1.5g", 1536), ("2T", 2 * 1024**2)]
)
def test_memory(text: str, mebibytes: int) -> None:
    assert parse_memory(text) == mebibytes


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("90m", timedelta(minutes=90)),
        ("36h", timedelta(hours=36)),
        ("2d12h", timedelta(days=2, hours=12)),
        ("1h 30m", timedelta(hours=1, minutes=30)),
        ("12:00:00", timedelta(hours=12)),
        ("2-12:30:01", timedelta(days=2, hours=12, minutes=30, seconds=1)),
    ],
)
def test_durations(text: str, length: timedelta) -> None:
    assert parse_duration(text) == length


@pytest.mark.parametrize("text", ["", "64", "64 bytes", "-1GiB", "0GiB", "GiB"])
def test_what_is_no_memory(text: str) -> None:
    with pytest.raises(UsageError, match=r"--memory .* is no amount of memory"):
        parse_memory(text)


# A bare number is minutes to SLURM and seconds to others.
@pytest.mark.parametrize("text", ["", "90", "0m", "soon", "1:30", "-1h", "h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match=r"--time_limit .* is no duration"):
        parse_duration(text)


def test_pairs_keep_their_values_as_they_are() -> None:
    assert parse_pairs("--env", ["A=b=c", "B=", "C= $x\n"]) == {"A": "b=c", "B": "", "C": " $x\n"}


@pytest.mark.parametrize("texts", [["hunter2"], ["A=hunter2", "A=hunter2"]])
def test_a_faulty_pair_is_not_repeated_since_it_may_be_secret(texts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_pairs("--env", texts)
    assert "hunter2" not in str(caught.value)


def test_mounts() -> None:
    assert parse_mounts(["weka://bucket:/weka", "/a:b:/c"]) == (Mount("weka://bucket", "/weka"), Mount("/a:b", "/c"))


@pytest.mark.parametrize("text", ["/a", "/a:b", ":/a", "weka://bucket", "a:"])
def test_what_is_no_mount(text: str) -> None:
    with pytest.raises(UsageError, match="SOURCE:/absolute/target"):
        parse_mounts([text])
