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


def race(slow: Callable[[], object], fast: Callable[[], object], rounds: int) -> tuple[dict, object, object]:
    "(seconds and ratios, result of slow, result of fast); both take turns after a round that is not counted."
    seconds, cpu, results = [], [], (slow(), fast())
    for _ in range(rounds):
        marks = [(time.perf_counter(), time.process_time())]
        for action in (slow, fast):
            action()
            marks.append((time.perf_counter(), time.process_time()))
        for kept, column in ((seconds, 0), (cpu, 1)):
            kept.append([after[column] - before[column] for before, after in zip(marks, marks[1:])])
    best, best_cpu = ([min(column) for column in zip(*kept)] for kept in (seconds, cpu))
    ratios = [one / other for one, other in seconds]
    return {"slow_s": best[0], "fast_s": best[1], "ratio": best[0] / best[1], "ratio_cpu_time": best_cpu[0] / best_cpu[1],
            "ratio_rounds": {"slowest": min(ratios), "median": median(ratios)}}, *results
