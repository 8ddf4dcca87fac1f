"""Every overlay renders, has only known fields and keeps what docs/kubernetes.md promises."""

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, made_once
from kubeflow_trainer_api import models
from manifest_checks import (
    Manifest,
    Work,
    environment,
    expanded,
    pod_problems,
    problems,
    render,
    work,
)

OVERLAYS = sorted(folder.name for folder in (ROOT / "k8s/overlays").iterdir())
OLDEST, NEWEST = "1.31", "1.37"  # podFailurePolicy is stable since 1.31
# Not in Kubernetes itself; Kubeflow's models know them.
CUSTOM = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
# Components in the order in which docs/kubernetes.md puts them together.
TOGETHER = {
    "spot nodes, several": ["nodes", "spot-eks", "jobset"],
    "spot, TrainJob": ["nodes", "spot-gke", "jobset", "trainjob"],
    "one GPU, bucket": ["object-store", "network-policy"],
    "queue of JobSets": ["nodes", "priority", "jobset", "kueue", "network-policy"],
    "queue of TrainJobs": ["nodes", "rdma", "jobset", "trainjob", "kueue"],
    "spot, bucket": ["eight-gpus", "spot-aks", "object-store"],
    "files of several nodes": ["nodes", "files"],
    "a namespace that is there": ["eight-gpus", "existing-namespace"],
}
FIFO = {"sortOptions": {"order": "fifo"}}

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> dict[str, list[Manifest]]:
    """Name -> manifests, of each overlay and of each row of TOGETHER."""

    def make(folder: Path) -> None:
        found = {name: render(ROOT / "k8s/overlays" / name) for name in OVERLAYS}
        for name, components in TOGETHER.items():
            (folder / "overlay" / name).mkdir(parents=True)
            found[name] = render(overlay(folder / "overlay" / name, components, **FIFO))
        (folder / "manifests.json").write_text(json.dumps(found))

    folder = made_once(tmp_path_factory, "rendered", make)
    found: dict[str, list[Manifest]] = json.loads((folder / "manifests.json").read_text())
    return found


def overlay(folder: Path, components: list[str], base: str = "base", **more: Any) -> Path:
    """Write a user's overlay beside the repository; unknown components are the user's own."""
    here = Path(os.path.relpath(ROOT / "k8s", folder.resolve()))
    known = {path.name for path in (ROOT / "k8s/components").iterdir()}
    values = {
        "resources": [str(here / base)],
        "components": [
            str(here / "components" / name) if name in known else name for name in components
        ],
        **more,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(values))
    return folder


def own_config(folder: Path) -> list[Manifest]:
    """Write a run config into an overlay, and return the generator that takes it."""
    text = (ROOT / "k8s/base/run.yaml").read_text().replace("2e-4", "1e-4")
    (folder / "run.yaml").write_text(text)
    options = {"immutable": True}
    return [{"name": "run", "behavior": "replace", "files": ["run.yaml"], "options": options}]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    # A pod has a network of its own; here another run may have taken the port.
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)


@pytest.mark.parametrize("version", [pytest.param(OLDEST, marks=pytest.mark.proof), NEWEST])
@pytest.mark.parametrize("name", [*OVERLAYS, *TOGETHER])
@pytest.mark.slow
def test_kubernetes_knows_every_field(rendered, name, version):
    for manifest in rendered[name]:
        check_schema(manifest, version)


def check_schema(manifest: Manifest, version: str) -> None:
    if model := CUSTOM.get(manifest["kind"]):
        # What the model does not know it leaves out without a word; so what comes back is compared.
        back = model.from_dict(copy.deepcopy(manifest)).to_dict()
        assert not list(lost(manifest, back))
    else:
        kubernetes_validate.validate(
            manifest, version, strict=True
        )  # raises where it has no schema


def lost(given: Any, back: Any, where: str = "") -> Iterator[str]:
    if isinstance(given, dict) and isinstance(back, dict):
        for key, value in given.items():
            yield from (
                [f"{where}.{key}"] if key not in back else lost(value, back[key], f"{where}.{key}")
            )
    elif isinstance(given, list) and isinstance(back, list) and len(given) == len(back):
        for index, (one, other) in enumerate(zip(given, back)):
            yield from lost(one, other, f"{where}[{index}]")
    elif given != back:
        yield f"{where}: {given!r} came back as {back!r}"


@pytest.mark.parametrize("name", [*OVERLAYS, *TOGETHER])
def test_everything_fits_together(rendered, name, tmp_path):
    """Check references, selectors, world sizes, commands, policies, security and limits."""
    assert found_in(rendered[name], tmp_path) == []


def found_in(manifests: list[Manifest], folder: Path) -> list[str]:
    """Faults of a run, or of the pod that waits for files."""
    waits = any((m["kind"], m["metadata"]["name"]) == ("Job", "files") for m in manifests)
    return pod_problems(manifests) if waits else problems(manifests, folder)


def documented(language: str) -> list[str]:
    """The blocks of docs/kubernetes.md."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/kubernetes.md").read_text(), re.S)


def test_the_folders_of_the_documentation_render_and_fit_together(tmp_path):
    """Its own commands make them, all but those that need a cluster."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    commands = [block for block in documented("bash") if "mkdir" in block]
    assert len(commands) == 2
    for block in commands:
        local = "\n".join(
            line for line in block.splitlines() if not re.match(r"kubectl|python|tar", line)
        )
        subprocess.run(["bash", "-e", "-c", local], cwd=tmp_path, check=True)
    for name in ("my_run", "my_files"):
        assert found_in(render(tmp_path / name), tmp_path) == []
    listed, component, account = documented("yaml")
    (tmp_path / "my_run/size").mkdir()
    (tmp_path / "my_run/size/kustomization.yaml").write_text(component)
    (tmp_path / "my_run/kustomization.yaml").write_text(listed + account)
    manifests = render(tmp_path / "my_run")
    assert problems(manifests, tmp_path) == []
    assert work(manifests).nodes == 4
    assert of_kind(manifests, "ServiceAccount")["imagePullSecrets"]
    assert of_kind(manifests, "PersistentVolumeClaim")["spec"]["storageClassName"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.proof) if number % 4 else name
        for number, name in enumerate(OVERLAYS)
    ],
)
def test_a_users_folder_on_any_overlay_fits_together(tmp_path, name):
    """As docs/kubernetes.md has it, with a namespace and an image of its own."""
    more = {
        "namespace": "my-run",
        "images": [{"name": "finetune", "newName": "registry.example/finetune", "newTag": "2.0"}],
        "configMapGenerator": own_config(tmp_path),
    }
    manifests = render(overlay(tmp_path, [], base=f"overlays/{name}", **more, **FIFO))
    assert found_in(manifests, tmp_path) == []
    assert {container["image"] for container in work(manifests).containers} == {
        "registry.example/finetune:2.0"
    }


@pytest.mark.parametrize(
    "kind", [["indexed-job"], ["jobset"], ["jobset", "trainjob"]], ids=" ".join
)
def test_other_numbers_of_nodes_are_one_component_before_the_kind(tmp_path, kind):
    """That of docs/kubernetes.md: four nodes of four GPUs."""
    _, component, _ = documented("yaml")
    (tmp_path / "size").mkdir()
    (tmp_path / "size/kustomization.yaml").write_text(component)
    manifests = render(overlay(tmp_path, ["nodes", "size", *kind], **FIFO))
    assert problems(manifests, tmp_path) == []
    assert work(manifests).nodes == 4


@pytest.mark.parametrize(
    "components",
    [
        ["nodes", "jobset", "spot-eks"], ["rdma", "nodes"], ["overlays/jobset", "spot-eks"],
        ["nodes", "jobset", "kueue", "trainjob"], ["indexed-job"],
        *(pytest.param(each, marks=pytest.mark.proof) for each in (
            ["nodes", "jobset", "rdma"], ["nodes", "jobset", "priority"], ["spot-gke", "nodes"],
            ["rdma", "eight-gpus"], ["object-store", "nodes"], ["nodes", "object-store", "jobset"],
            ["kueue", "nodes", "jobset"], ["nodes", "kueue", "jobset"], ["jobset"],
            ["nodes", "trainjob"], ["nodes", "eight-gpus"],
            ["nodes", "indexed-job", "jobset"],
        )),
    ],
    ids=" ".join,
)  # fmt: skip
def test_components_in_another_order_are_an_error_not_another_job(tmp_path, components):
    """Also after those of an overlay that is built upon."""
    built_upon = [name for name in components if name.startswith("overlays")] or ["base"]
    with pytest.raises(AssertionError, match="test|nothing selected|no matches"):
        render(overlay(tmp_path, [c for c in components if c not in built_upon], *built_upon))


def test_several_nodes_wait_in_the_queue_with_their_own_kind(rendered):
    for name, kind in (
        ("kueue", "Job"),
        ("queue of JobSets", "JobSet"),
        ("queue of TrainJobs", "TrainJob"),
    ):
        [queued] = [
            m for m in rendered[name] if m["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
        ]
        assert (queued["kind"], queued["spec"]["suspend"]) == (kind, True)


def test_every_kind_of_several_nodes_starts_the_same_command(rendered):
    found = [work(rendered[name]) for name in ("multi-node", "jobset", "trainjob")]
    commands = [
        [
            expanded(word, environment(each, each.node, 1)).replace(each.first_node, "FIRST")
            for word in each.args
        ]
        for each in found
    ]
    assert commands[0] == commands[1] == commands[2]


def test_a_changed_config_is_another_object_and_every_kind_asks_for_it(tmp_path):
    """A run that is started again must not find another config under the name that it knows."""
    mine = {"configMapGenerator": own_config(tmp_path), "namespace": "other"}
    names = set()
    (tmp_path / "checked").mkdir()
    for components in ([], ["nodes", "jobset"], ["nodes", "jobset", "trainjob"]):
        for more in ({}, mine):
            manifests = render(overlay(tmp_path, components, **more, **FIFO))
            assert problems(manifests, tmp_path / "checked") == []
            names.add(of_kind(manifests, "ConfigMap")["metadata"]["name"])
    assert len(names) == 2


def volume(found: Work, name: str) -> Manifest:
    return next(volume for volume in found.pod["volumes"] if volume["name"] == name)


def variable(found: Work, name: str) -> Manifest:
    return next(variable for variable in found.node["env"] if variable["name"] == name)


def rules(found: Work) -> list[Manifest]:
    return found.job["podFailurePolicy"]["rules"]


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    return next(manifest for manifest in manifests if manifest["kind"] == kind)


def child(manifests: list[Manifest], kind: str) -> Manifest:
    spec = of_kind(manifests, kind)["spec"]
    return spec.get("template", {"spec": spec})["spec"]["replicatedJobs"][0]


def set_argument(found: Work, old: str, new: str) -> None:
    found.args[found.args.index(old)] = new


# What is broken -> where, how, and what the checks say of it.
BROKEN: dict[str, tuple[str, Callable[[list[Manifest], Work], Any], str]] = {
    "config map of another name": (
        "jobset", lambda m, w: of_kind(m, "ConfigMap")["metadata"].update(name="other"),
        "no ConfigMap",
    ),
    "secret that must be there": (
        "single-gpu", lambda m, w: volume(w, "tokens")["secret"].pop("optional"), "not optional",
    ),
    "mount without a volume": (
        "single-gpu", lambda m, w: w.node["volumeMounts"].append({"name": "x", "mountPath": "/x"}),
        "mounts undefined volumes",
    ),
    "runs that can only be read": (
        "single-gpu", lambda m, w: w.node["volumeMounts"][2].update(readOnly=True), "may not write",
    ),
    "tokens for all": (
        "single-gpu", lambda m, w: volume(w, "tokens")["secret"].update(defaultMode=0o444),
        "or others may",
    ),
    "tokens elsewhere": (
        "single-gpu",
        lambda m, w: variable(w, "HF_TOKEN_PATH").update(value="/x"), "looked for where nothing",
    ),
    "a GPU that is not missed": (
        "spot-gke", lambda m, w: w.node["env"].pop(0), "FINETUNE_NEEDS_GPU",
    ),
    "not a command": (
        "single-gpu", lambda m, w: set_argument(w, "launch", "lauch"), "no command lauch",
    ),
    "no service": ("multi-node", lambda m, w: m.remove(of_kind(m, "Service")), "no Service"),
    "names for the ready only": (
        "multi-node", lambda m, w: of_kind(m, "Service")["spec"].pop("publishNotReadyAddresses"),
        "no names",
    ),
    "runtime after the job": (
        "trainjob", lambda m, w: m.append(m.pop(m.index(of_kind(m, "TrainingRuntime")))),
        "before its runtime",
    ),
    "no ancestor": (
        "trainjob",
        lambda m, w: child(m, "TrainingRuntime")["template"]["metadata"]["labels"].clear(),
        "PET_ variables",
    ),
    "Trainer's variables": (
        "trainjob", lambda m, w: w.node["env"].append({"name": "PET_NNODES", "value": "2"}),
        "Trainer's to give",
    ),
    "names elsewhere": (
        "jobset", lambda m, w: of_kind(m, "JobSet")["spec"]["network"].update(subdomain="x"),
        "by its name",
    ),
    "never again": ("jobset", lambda m, w: w.failure_policy.update(maxRestarts=0), "or never"),
    "old pods beside new": (
        "jobset", lambda m, w: w.failure_policy.pop("restartStrategy"), "beside old ones",
    ),
    "four pods of one run": ("single-gpu", lambda m, w: w.job.update(parallelism=4), "work of one"),
    "there without end": (
        "jobset", lambda m, w: of_kind(m, "JobSet")["spec"].pop("ttlSecondsAfterFinished"),
        "nothing removes it",
    ),
    "InfiniBand or not": ("rdma", lambda m, w: w.node["env"].pop(), "does not insist"),
    "no second try": ("single-gpu", lambda m, w: w.job.update(backoffLimit=0), "three times"),
    "no PID 1": (
        "jobset", lambda m, w: w.pod.update(shareProcessNamespace=True),
        "says shareProcessNamespace",
    ),
    "a sidecar": (
        "single-gpu", lambda m, w: w.pod["containers"].append({**w.node, "name": "other"}),
        "does not end",
    ),
    "a config that changes": (
        "jobset", lambda m, w: of_kind(m, "ConfigMap").pop("immutable"), "may change",
    ),
    "an open namespace": (
        "single-gpu",
        lambda m, w: of_kind(m, "Namespace")["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "privileged"},
        ),
        "does not enforce",
    ),
    "not drained": (
        "spot-eks",
        lambda m, w: w.job["template"]["metadata"].update(
            annotations={"karpenter.sh/do-not-disrupt": "true"},
        ),
        "not drain",
    ),
    "no disk": (
        "single-gpu",
        lambda m, w: w.node["resources"]["limits"].update({"ephemeral-storage": "1Gi"}),
        "hold more",
    ),
    "another namespace": (
        "single-gpu", lambda m, w: of_kind(m, "Job")["metadata"].update(namespace="other"),
        "namespaces",
    ),
    "service of others": (
        "multi-node", lambda m, w: of_kind(m, "Service")["spec"].update(selector={"app": "x"}),
        "selects no pod",
    ),
    "subdomain of others": ("multi-node", lambda m, w: w.pod.update(subdomain="x"), "subdomain"),
    "open to anybody": (
        "one GPU, bucket",
        lambda m, w: of_kind(m, "NetworkPolicy")["spec"]["ingress"][0].pop("from"), "or all",
    ),
    "runtime of another name": (
        "trainjob", lambda m, w: of_kind(m, "TrainJob")["spec"]["runtimeRef"].update(name="x"),
        "no TrainingRuntime is named x",
    ),
    "one pod too few": ("jobset", lambda m, w: w.job.update(parallelism=1), "say something else"),
    "not shared": (
        "jobset",
        lambda m, w: of_kind(m, "PersistentVolumeClaim")["spec"].update(
            accessModes=["ReadWriteOnce"],
        ),
        "share no volume",
    ),
    "lost with the pod": ("one GPU, bucket", lambda m, w: w.args.pop(), "outlives"),
    "restarted in place": (
        "single-gpu", lambda m, w: w.pod.update(restartPolicy="OnFailure"), "restartPolicy",
    ),
    "two pods at once": ("single-gpu", lambda m, w: w.job.pop("podReplacementPolicy"), "beside"),
    "codes out of order": (
        "jobset", lambda m, w: rules(w)[1]["onExitCodes"].update(values=[75, 2]), "sorted",
    ),
    "rule for no container": (
        "single-gpu", lambda m, w: rules(w)[1]["onExitCodes"].update(containerName="x"),
        "not there",
    ),
    "rule for one of two runs": (
        "cpu-debug", lambda m, w: rules(w)[1]["onExitCodes"].update(containerName="node"),
        "does not see",
    ),
    "exit codes before disruptions": (
        "single-gpu", lambda m, w: rules(w).reverse(),
        "preempted at the start (2)|preempted at the start: ends",
    ),
    "no rule for 2": (
        "single-gpu", lambda m, w: rules(w).pop(1), r"wrong config \(2\): counted",
    ),
    "no rule for 75": (
        "single-gpu", lambda m, w: rules(w).pop(2), r"saved \(75\): counted",
    ),
    "a bad config again and again": (
        "jobset", lambda m, w: w.failure_policy["rules"].pop(0), r"wrong config \(2\): again",
    ),
    "preemptions counted": (
        "trainjob", lambda m, w: w.failure_policy["rules"].pop(1), "preempted, saved: counted",
    ),
    "one pod replaced": ("jobset", lambda m, w: w.job.update(backoffLimit=6), "others wait"),
    "host's disk": (
        "jobset", lambda m, w: w.pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "volume x",
    ),
    "a token": ("single-gpu", lambda m, w: w.pod.pop("automountServiceAccountToken"), "token"),
    "writable image": (
        "cpu-debug", lambda m, w: w.containers[1]["securityContext"].pop("readOnlyRootFilesystem"),
        "container base: securityContext",
    ),
    "no limits": (
        "cpu-debug", lambda m, w: w.containers[0]["resources"].pop("limits"), "container rows asks",
    ),
    "memory on loan": (
        "single-gpu", lambda m, w: w.node["resources"]["requests"].update(memory="1Gi"),
        "less memory",
    ),
    "fewer GPUs asked than taken": (
        "single-gpu", lambda m, w: w.node["resources"]["requests"].update({"nvidia.com/gpu": "2"}),
        "GPUs of requests",
    ),
    "endless scratch": (
        "single-gpu", lambda m, w: volume(w, "scratch").update(emptyDir={}), "fill the node",
    ),
    "shared memory over the limit": (
        "single-gpu", lambda m, w: volume(w, "shm")["emptyDir"].update(sizeLimit="1Ti"), "/dev/shm",
    ),
    "latest": (
        "single-gpu", lambda m, w: w.node.update(image="registry:5000/finetune"), "stays the same",
    ),
    "two images": ("cpu-debug", lambda m, w: w.node.update(image="finetune:2"), "several images"),
    "grace that no cloud gives": (
        "spot-gke", lambda m, w: w.pod.update(terminationGracePeriodSeconds=60), "gives 15",
    ),
    "a save longer than the grace": (
        "single-gpu", lambda m, w: w.pod.update(terminationGracePeriodSeconds=60),
        "counts on 590 s",
    ),
    "more processes than GPUs": (
        "spot-eks", lambda m, w: set_argument(w, "8", "16"), "16 processes on a node of 8",
    ),
    "rank of no node": (
        "multi-node", lambda m, w: set_argument(w, "$(JOB_COMPLETION_INDEX)", "$(RANK_OF_NODE)"),
        "nothing says",
    ),
    "first node under another "
    "name": (
        "multi-node", lambda m, w: set_argument(w, "finetune-0.finetune", "finetune-0.x"),
        "look for finetune-0.x",
    ),
    "every node the first": (
        "multi-node", lambda m, w: set_argument(w, "$(JOB_COMPLETION_INDEX)", "0"),
        "8 processes, where 2 nodes",
    ),
    "a setting that does not exist": (
        "spot-eks", lambda m, w: w.args.append("--train.epoch=3"), "train.epoch",
    ),
    "no such script": (
        "cpu-debug", lambda m, w: w.containers[0].update(command=["python", "data_scripts/x.py"]),
        "no data_scripts/x.py",
    ),
    "a batch that does not divide": (
        "jobset", lambda m, w: w.args.append("--train.global_batch_size=60"), "cannot be split",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_every_broken_manifest_is_detected(rendered, fault, tmp_path):
    name, break_it, message = BROKEN[fault]
    manifests = copy.deepcopy(rendered[name])
    break_it(manifests, work(manifests))
    found = problems(manifests, tmp_path)
    assert any(re.search(message, problem) for problem in found), found


@pytest.mark.parametrize("kind", ["Job", "JobSet", "TrainJob", "TrainingRuntime", "NetworkPolicy"])
def test_an_unknown_field_is_detected(rendered, kind):
    for manifests in rendered.values():
        for manifest in copy.deepcopy([m for m in manifests if m["kind"] == kind]):
            manifest["spec"]["replicas_"] = 2
            with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
                check_schema(manifest, NEWEST)
