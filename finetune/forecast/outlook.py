"""Say in a few lines whether a run fits, how fast it will be, and what was measured before."""

from collections.abc import Iterator

import torch

from finetune.config import Config
from finetune.engine.topology.launch import ParallelConfig
from finetune.errors import FinetuneError
from finetune.forecast import measured, speed
from finetune.forecast.choice import SMALLER, Chooser, capacity_here, micro_batches
from finetune.forecast.measured import Measurement

GB = 1e9
# From one kernel to the next while a GPU waits for PyTorch: a usual value, not measured here.
LAUNCH_SECONDS = 5e-6


def lines(
    config: Config, parallel: ParallelConfig, device: torch.device, precision: str,
    num_tokens: float, length: float,
) -> Iterator[str]:  # fmt: skip
    """Yield what a run's summary ends with: memory, and on a GPU tokens a second and hours.

    `num_tokens`: of the whole run; `length`: tokens of a usual document. What cannot be forecast is
    said so, and ends no run.
    """
    try:
        chooser = Chooser(config, precision=precision, on_gpu=device.type == "cuda")
        yield f"memory      {fits(chooser, parallel, capacity_here(device))}"
    except FinetuneError as exc:
        yield f"memory      not forecast: {exc}"
        return
    if device.type != "cuda":
        return
    try:
        gpu = torch.cuda.get_device_name(device)
        measurements = measured.read().get(gpu, [])
        found = speed_of(chooser, parallel, measurements, length, num_tokens)
        yield f"speed       {found or f'not measured on {gpu} (make gpu PART=speed)'}"
    except FinetuneError as exc:
        yield f"speed       unknown: {exc}"


def fits(chooser: Chooser, parallel: ParallelConfig, limit: float) -> str:
    """Say whether a run fits with how much to spare, or the cheapest change with which it does."""
    peak = chooser.forecast(parallel).peak
    needs = f"{peak / GB:.1f} of {limit / GB:.1f} GB by forecast"
    if peak <= limit:
        return f"fits: {needs}, {(limit - peak) / GB:.1f} GB to spare"
    change = chooser.cheapest_change(parallel, limit)
    advice = f"the cheapest change that fits: {change}" if change else f"it needs {SMALLER}"
    return f"does not fit: {needs}, {(peak - limit) / GB:.1f} GB too many; {advice}"


def speed_of(
    chooser: Chooser, parallel: ParallelConfig, measurements: list[Measurement], length: float,
    num_tokens: float | None,
) -> str:  # fmt: skip
    """Say how many tokens a second a run will train, and in how many hours; "" if unknown.

    What processes send each other is not counted. `num_tokens`: of the whole run, if that is known.
    """
    config, forecaster = chooser.config, chooser.forecaster()
    found = speed.closest(measurements, config) if chooser.precision != "fp32" else None
    if found is None:
        return ""
    case, rate, measurement = found
    share = speed.share_recomputed(config, forecaster.num_layers)
    work = speed.work_of(forecaster.model, chooser.model_config, length, share)
    total = work.total
    if forecaster.companion:  # its forward pass is a third of what training it would take
        beside = forecaster.companion
        total += speed.work_of(beside.model, beside.model.config, length, 0.0).total / 3
    tokens = 1e12 * rate.tflops / total * parallel.num_processes
    if tokens > (most := _most_tokens(chooser, parallel)):
        return (
            f"too small to forecast: under {most:,.0f} tokens/s, as each of its matrix products "
            f"takes {LAUNCH_SECONDS * 1e6:g} us to launch"
        )
    hours = f", {num_tokens / tokens / 3600:.1f} hours" if num_tokens else ""
    alike = f"as fast as {case!r}, {rate.tflops:,.0f} TFLOP/s ({measurement.source})"
    more = " in learning; sampling comes on top" if config.rollouts else ""
    return f"about {tokens:,.0f} tokens/s{hours}{more}, if {alike}"


def _most_tokens(chooser: Chooser, parallel: ParallelConfig) -> float:
    """Return the tokens a second of a run that does nothing but launch its matrix products."""
    config = chooser.config
    size = config.train.micro_batch_size
    if size == "auto":  # at most all of a step
        size = micro_batches(config, parallel)[-1]
    seconds = LAUNCH_SECONDS * chooser.forecast(parallel, size).products
    return size * config.data.max_length * parallel.num_processes / parallel.num_context / seconds


def peaks(measurements: list[Measurement]) -> Iterator[tuple[str, float, float]]:
    """Yield (case, forecast, measured), in GB: the newest of each case."""
    for measurement in measurements:
        for case, peak in measurement.peaks.items():
            yield case, peak.forecast_gb, peak.measured_gb


def accuracy(gpu: str, measurements: list[Measurement]) -> str:
    """Say how far forecasts were from the peaks that were measured on a GPU."""
    ratios = [forecast / found for _, forecast, found in peaks(measurements)]
    if not ratios:
        return f"no peak on {gpu} (make gpu PART=memory)"
    source = next(each.source for each in measurements if each.peaks)
    return (
        f"on {gpu} forecasts were {min(ratios):.2f} to {max(ratios):.2f} of {len(ratios)} peaks "
        f"({source})"
    )
