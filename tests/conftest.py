"""What all tests share."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from rslp.runtime import preemption
from tests.forks import Forks

# rslearn 0.1.19 calls what jsonargparse 4.53 has renamed.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

# Configs of the tests name classes of the tests.
os.environ.setdefault("RSLP_TRUST", "tests")

# Sums over several threads differ in their last bits from sums in one, and threads only fight over a small machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# On a busy machine, making examples may be slow; that says nothing of what is tested.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# A shell that starts the tests in the background, or nohup, ignores signals; so would each run that the tests start.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


# Files of one long test after the other; they come first, so that no core waits for another in the end.
LONG = (
    *("test_slurm.py", "test_whole_way.py", "test_whole_run.py", "test_refusals.py", "test_kills.py", "test_api.py"),
    *("test_real_points.py", "test_remote_run.py", "test_packers.py", "test_study_whole.py", "test_predictions.py"),
    *("test_stage1.py", "test_remote.py", "test_shipped_configs.py", "test_prediction.py", "test_comparison.py"),
    *("test_stage.py", "test_cache_damage.py", "test_damage.py", "test_order.py", "test_lease.py", "test_streams.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def signals_stay() -> Iterator[None]:
    """Take back the signal handlers that a test left, such as by a training in this process: children inherit them."""
    former = {number: signal.getsignal(number) for number in (*preemption.SIGNALS, signal.SIGINT)}
    yield
    for number, handler in former.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Where command lines start without importing the training stack anew."""
    with Forks() as forks:
        yield forks
