"""What users can call says the types of its arguments and results."""

import inspect

import pytest
import turboquant_mlx
from turboquant_mlx import calibration, eval

pytestmark = pytest.mark.quick


def functions():
    for package in (turboquant_mlx, calibration, eval):
        for name in package.__all__:
            found = getattr(package, name)
            if inspect.isfunction(found):
                yield f"{package.__name__}.{name}", found
            elif inspect.isclass(found) and found.__module__.startswith("turboquant_mlx"):
                for key, member in vars(found).items():
                    member = getattr(member, "__func__", getattr(member, "fget", None) or member)
                    if inspect.isfunction(member) and not key.startswith("_"):
                        yield f"{package.__name__}.{name}.{key}", member


FOUND = dict(functions())


def test_there_are_functions_to_look_at():
    assert {"turboquant_mlx.enable", "turboquant_mlx.TurboQuantKVCache.merge", "turboquant_mlx.eval.compare"} <= set(
        FOUND
    )


@pytest.mark.parametrize("name", FOUND)
def test_every_argument_and_result_has_a_type(name):
    signature = inspect.signature(FOUND[name])
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")]
    assert not bare and signature.return_annotation is not signature.empty, f"{name}: {', '.join(bare) or 'the result'}"
