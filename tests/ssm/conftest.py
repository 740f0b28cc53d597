import pytest

from llmrec.ssm import native


@pytest.fixture
def torch_code(monkeypatch):
    """As where there is no compiler: float32, too, takes the plain torch code."""
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.fixture(params=["torch", "native"])
def code(request):
    """For float32 on a CPU there are two codes."""
    if request.param == "torch":
        request.getfixturevalue("torch_code")
    elif native.library() is None:
        pytest.skip("no C++ kernels: no compiler, or LLMREC_NATIVE=0")
    return request.param
