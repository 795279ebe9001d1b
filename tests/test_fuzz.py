"""A few seconds of the fuzzer: spoilt inputs of every kind end in a result or a clear refusal; benchmarks/fuzz.py goes on for minutes."""

import pytest
from fuzz_cases import KINDS, Place, quiet
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.slow
MODELS = (
    "adapter configs",
    "training records",
    "model configs",
    "adapter weights",
    "profiles",
)  # each case builds a model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CATLIB_ROOT", "")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TQDM_DISABLE", "1")
        patch.setenv("TRANSFORMERS_VERBOSITY", "error")
        quiet()
        yield Place(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_spoilt_is_read_or_refused(place, kind):
    count = 8 if kind in MODELS else 200 if kind == "photos" else 40

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(place.strategy(kind))
    def tried(data):
        place.survives(kind, data)

    tried()
