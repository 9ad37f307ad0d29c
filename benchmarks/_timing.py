"What the benchmarks share; no benchmark itself."
import time
from collections.abc import Callable
from statistics import median


def timed(action: Callable[[], object], repeats: int = 9) -> tuple[float, object]:
    "(median seconds, result) of a call, after one that is not counted."
    result, seconds = action(), []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - begun)
    return median(seconds), result
