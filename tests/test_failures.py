"""Failures of the machine exit with 1 and are retried; user errors exit with 2 and are not."""

import errno
import hashlib
import http.server
import pickle
import threading
from functools import partial

import httpx
import pytest
import requests
import torch
from conftest import Workshop
from safetensors.torch import save_file

from finetune import failures
from finetune.data import source_files
from finetune.data.hub import _load
from finetune.engine.rundir import RunDirectory
from finetune.errors import (
    DeviceError,
    FinetuneError,
    ModelError,
    Outage,
    OutOfMemory,
    Preempted,
    RunDirectoryError,
    TopologyError,
    UserError,
)
from finetune.models.load import translated


@pytest.fixture
def hub():
    """A server whose every answer is the code that its path names."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(int(self.path[1:]))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def as_transformers_does(ask):
    """What went wrong is the cause of an OSError, with words of its own."""
    try:
        ask()
    except Exception as exc:
        raise OSError("We couldn't connect to the hub") from exc


@pytest.mark.parametrize("get", [httpx.get, requests.get], ids=["httpx", "requests"])
def test_an_unreachable_hub_is_not_a_user_error(get):
    message = "model a/b cannot be loaded now: We couldn't connect.*HF_HUB_OFFLINE=1.*HF_ENDPOINT"
    with pytest.raises(Outage, match=message), translated("model a/b"):
        as_transformers_does(lambda: get("http://127.0.0.1:9", timeout=1))


@pytest.mark.parametrize(
    ("code", "error"), [(503, Outage), (429, Outage), (404, ModelError), (401, ModelError)]
)
def test_an_overloaded_server_is_an_outage_and_a_refusal_is_not(hub, code, error):
    with pytest.raises(error), translated("model a/b"):
        as_transformers_does(lambda: httpx.get(f"{hub}/{code}").raise_for_status())


def test_an_uncached_data_set_in_offline_mode_is_a_user_error():
    """HF_HUB_OFFLINE, which all tests set: huggingface_hub's error is a ConnectionError, too."""
    from finetune.errors import DataError

    with pytest.raises(DataError, match="datasets cannot load it"):
        _load("owner/name")


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS]
)
def test_a_full_or_missing_disk_is_an_outage(number):
    with pytest.raises(Outage, match="the cache: "):
        failures.reraise(OSError(number, "words"), "the cache")


class SafetensorError(Exception):
    """As safetensors calls its own."""


@pytest.mark.parametrize(
    ("exc", "why"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (Exception("No space left on device (os error 28)"), "the disk is full"),  # tokenizers
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] PytorchStreamWriter failed "
                         "writing file: No space left"),
            "the disk is full",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), "the disk fails"),
        (OSError(errno.EIO, "Input/output error"), "the disk fails"),
    ],
)  # fmt: skip
def test_a_librarys_write_error_is_reported_with_the_path(tmp_path, exc, why):
    assert isinstance(failures.translate(exc), Outage)
    with (
        pytest.raises(Outage, match=f"{tmp_path} cannot be written now: {why}"),
        failures.writing(tmp_path),
    ):
        raise exc


@pytest.mark.parametrize(
    "exc", [ValueError("a bug"), RuntimeError("shapes do not fit"), OutOfMemory("ours")]
)
def test_other_errors_pass_unchanged(tmp_path, exc):
    with pytest.raises(type(exc)) as caught, failures.writing(tmp_path):
        raise exc
    assert caught.value is exc


def test_a_path_that_is_too_long_is_a_user_error(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / ("a" * 256)).mkdir()
    error = failures.translate(caught.value)
    assert isinstance(error, UserError)
    assert str(tmp_path) in str(error)
    assert str(error).endswith("; choose a shorter one")


MACHINE = {
    OutOfMemory: [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.distributed.DistBackendError(
            "NCCL error\nLast error:\nCuda failure 2 'out of memory'"
        ),
        RuntimeError("Registering memory failed with cudaError: 2"),
    ],
    DeviceError: [
        RuntimeError("Registering memory failed with cudaError: 201"),  # an invalid context
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
        RuntimeError(
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"
        ),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("device busy"),
    ],
    TopologyError: [
        torch.distributed.DistBackendError(
            "NCCL error in: NCCLUtils.cpp:94, unhandled system error"
        ),
        RuntimeError(
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
        ),
        torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
    ],
}


@pytest.mark.parametrize(
    ("exc", "error"),
    [(exc, error) for error, raised in MACHINE.items() for exc in raised],
    ids=lambda value: str(value)[:40],
)
def test_failure_of_a_device_while_loading_is_not_the_users(exc, error):
    with (
        pytest.raises(error, match="^model 'a/b' cannot be loaded now: ") as caught,
        translated("model 'a/b'"),
    ):
        raise exc
    assert caught.value.exit_code == 1
    assert caught.value.__cause__ is exc


def test_device_failures_are_found_below_library_errors():
    with (
        pytest.raises(DeviceError, match="cannot be loaded now: cannot read shard 2"),
        translated("model a/b"),
    ):
        raise ValueError("cannot read shard 2") from MACHINE[DeviceError][0]


@pytest.mark.parametrize(
    "exc",
    [
        RuntimeError("FP8 quantized models require a GPU with CUDA"),
        RuntimeError(
            "Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is "
            "False"
        ),
        RuntimeError("Error(s) in loading state_dict: size mismatch"),
        ValueError("config.json names CUDA as its author"),
        # A mistake of ours in the order of collectives.
        RuntimeError(
            "[enforce fail at gloo/transport/tcp/pair.cc:535] op.preamble.length <= op.nbytes. 20 "
            "vs 16"
        ),
    ],
    ids=str,
)
def test_repeatable_errors_are_not_machine_failures(exc):
    assert failures.translate(exc) is None
    with pytest.raises(ModelError), translated("model a/b"):
        raise exc


def test_nccl_is_quoted_with_what_went_wrong():
    exc = torch.distributed.DistBackendError(
        "NCCL error in: x.cpp:1, see\nncclRemoteError: ...\nLast error:\nsocketPoll: no"
    )
    assert str(failures.translate(exc)) == "NCCL error in: x.cpp:1, see socketPoll: no"


def raising(exc):
    def fail(*_, **__):
        raise exc

    return fail


@pytest.mark.parametrize("place", ["adapter", "head", "forecast", "best", "launch", "rows"])
def test_machine_failures_are_separated_from_other_library_errors(monkeypatch, tmp_path, place):
    """Each place takes what it does not know for a mistake of the user, or works without."""
    fail = raising(torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"))
    error: type[FinetuneError] = DeviceError
    if place == "adapter":
        import peft

        from finetune.models import adapters

        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
        save_file({"a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "adapter_model.safetensors")
        monkeypatch.setattr(peft.PeftModel, "from_pretrained", fail)
        act = partial(adapters._continued, torch.nn.Linear(1, 1), str(tmp_path))
    elif place == "head":
        from finetune.models import head

        model = torch.nn.Linear(1, 1)
        model.config, model.forward = type("Config", (), {"get_text_config": fail}), None
        act = partial(head._probe, model, model, model)
    elif place == "forecast":
        from finetune.forecast import trace

        made = trace.Rehearsal.__new__(trace.Rehearsal)
        made._rows = []
        monkeypatch.setattr(trace.Rehearsal, "_trace", fail)
        act = partial(made.trace, trace.Shape(1, 1, 1))
    elif place == "best":
        from finetune.engine.checkpoint import resume

        topology = type("Stub", (), {"on_main": fail})
        act = partial(resume.put_back_best, tmp_path, 1, topology, None)
    elif place == "launch":
        from accelerate.commands import launch

        from finetune.survival import launcher

        monkeypatch.setattr(launch, "_validate_launch_command", fail)
        act = partial(launcher.read, ["--cpu", "train.py"])
    else:
        error = Outage
        of_disk = raising(OSError(errno.EIO, "Input/output error"))
        monkeypatch.setattr(hashlib, "file_digest", of_disk)
        (tmp_path / "rows.jsonl").touch()
        act = partial(source_files.fingerprint, str(tmp_path / "rows.jsonl"))

    with pytest.raises(error):
        act()


def test_every_error_has_one_root_and_can_be_pickled():
    from finetune import errors

    own = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in own if kind.__module__ == errors.__name__]
    assert kinds
    for kind in kinds:
        assert issubclass(kind, FinetuneError | Preempted)
        assert kind.__name__ in errors.__doc__, "it stands in the tree"
        again = pickle.loads(pickle.dumps(kind("why")))
        assert (type(again), str(again), again.exit_code) == (kind, "why", kind.exit_code)
    assert not issubclass(Preempted, Exception), (
        "an `except Exception` in a library would swallow it"
    )


def test_a_folder_without_permission_is_not_an_outage():
    with pytest.raises(ModelError, match="model a/b cannot be loaded: "), translated("model a/b"):
        raise PermissionError(errno.EACCES, "words")


def test_a_file_in_place_of_a_run_directory_is_a_user_error(workshop: Workshop):
    from finetune import config as configs

    (workshop.folder / "runs").write_text("")
    config, _ = configs.parse(["--config", str(workshop.write(workshop.config()))])
    with pytest.raises(RunDirectoryError):
        RunDirectory(config).create(config)


def test_a_model_that_gives_no_probabilities_is_named():
    """What PyTorch says of NaN, where a token is drawn."""
    broken = torch.full((1, 4), float("nan"))
    with pytest.raises(RuntimeError) as raised:
        torch.multinomial(broken, 1)
    assert isinstance(failures.translate(raised.value), ModelError)
