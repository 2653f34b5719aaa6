"""Where do the NPU tests run? On simulated NPUs (under test/npu_sim/run), or with `--npu real` on the machine's own."""

import os
import pathlib

import pytest

HERE = pathlib.Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--npu", choices=("sim", "real"), default="sim", help="simulated NPUs, or this machine's")


def on_real_npus(config):
    return config.getoption("--npu", default="sim") == "real"


def pytest_collection_modifyitems(config, items):
    if on_real_npus(config) or "NPU_SIM" in os.environ:
        return
    reason = "needs simulated NPUs: test/npu_sim/run -n 8 python -m pytest test/npu"
    for item in items:
        if HERE in pathlib.Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def real(pytestconfig):
    return on_real_npus(pytestconfig)


@pytest.fixture
def sim(real):
    """The simulator's counters, at zero; a test that asks for them has nothing to say about real NPUs."""
    if real:
        pytest.skip("about the simulator")
    import npu_sim

    npu_sim.reset()
    return npu_sim
