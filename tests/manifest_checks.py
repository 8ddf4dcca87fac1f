"""Find faults in rendered manifests beyond their schemas; each fault is a sentence.

What Kubernetes does is written down here where it decides something: which rule of a policy counts,
what it says when it ends a Job, which names it gives.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finetune import config as configs
from finetune.config import accumulation_steps
from finetune.errors import UserError
from finetune.survival import launcher

Manifest = dict[str, Any]
GPU = "nvidia.com/gpu"
# The Pod Security Standard "restricted", with the image's user; ALLOWED_FIELDS below leaves out
# everything else that it forbids.
POD_SECURITY = {
    "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}  # fmt: skip
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
VOLUMES = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
# Node label of a cloud's spot machines -> its value, the seconds that a pod really gets, and
# whether the nodes are tainted with it.
SPOT = {
    "karpenter.sh/capacity-type": ("spot", 110, False),
    "cloud.google.com/gke-spot": ("true", 15, True),
    "kubernetes.azure.com/scalesetpriority": ("spot", 25, True),
}
# Where a container finds what: volume, its folder, and whether it may write there.
MOUNTS = {
    "/config": ("config", None, False), "/tokens": ("tokens", None, False),
    "/runs": ("storage", "runs", True), "/models": ("storage", "models", True),
    "/scratch": ("scratch", None, True), "/dev/shm": ("shm", None, True),
}  # fmt: skip
# All that a run's pods and Jobs say. What is not here was never thought of: another container never
# ends, a probe ends what goes well, a shared process namespace takes PID 1 from tini.
ALLOWED_FIELDS = {
    "pod": set(
        "restartPolicy terminationGracePeriodSeconds serviceAccountName "
        "automountServiceAccountToken enableServiceLinks securityContext tolerations "
        "containers initContainers volumes nodeSelector priorityClassName subdomain".split()
    ),
    "container": set(
        "name image imagePullPolicy command args env envFrom resources securityContext "
        "terminationMessagePolicy volumeMounts".split()
    ),
    "Job": set(
        "backoffLimit podReplacementPolicy ttlSecondsAfterFinished podFailurePolicy template "
        "completionMode parallelism completions suspend".split()
    ),
}
ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def render(folder: Path) -> list[Manifest]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


@dataclass(frozen=True)
class Work:
    """The Job that makes the pods of a run, perhaps the child of a JobSet or TrainJob runtime."""

    kind: str
    name: str
    job: Manifest
    args: list[str]
    nodes: int
    failure_policy: Manifest

    @property
    def first_node(self) -> str:
        """Return the name of its first pod: by the Job's Service, or in the JobSet's network."""
        network = (
            self.pod.get("subdomain") if self.kind == "Job" else self.name.removesuffix("-node-0")
        )
        return f"{self.name}-0.{network}"

    @property
    def pod(self) -> Manifest:
        return self.job["template"]["spec"]

    @property
    def node(self) -> Manifest:
        return next(
            container for container in self.pod["containers"] if container["name"] == "node"
        )

    @property
    def containers(self) -> list[Manifest]:
        return [*self.pod.get("initContainers", []), *self.pod["containers"]]

    @property
    def labels(self) -> dict[str, str]:
        """Those that the controllers add, too."""
        own = self.job["template"].get("metadata", {}).get("labels", {})
        return {**own, "batch.kubernetes.io/job-name": self.name}


def work(manifests: list[Manifest]) -> Work:
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    if job := by_kind.get("Job"):
        spec = job["spec"]
        found = Work("Job", job["metadata"]["name"], spec, [], spec.get("completions", 1), {})
    else:
        top = (
            by_kind.get("TrainingRuntime", {}).get("spec", {}).get("template") or by_kind["JobSet"]
        )
        kind = "TrainJob" if "TrainJob" in by_kind else "JobSet"
        [child] = top["spec"]["replicatedJobs"]
        spec, name = child["template"]["spec"], by_kind[kind]["metadata"]["name"]
        found = Work(
            kind,
            f"{name}-{child['name']}-0",
            spec,
            [],
            spec["completions"],
            top["spec"]["failurePolicy"],
        )
    trainer = by_kind.get("TrainJob", {}).get("spec", {}).get("trainer", {})
    return replace(
        found, args=found.node.get("args", []), nodes=trainer.get("numNodes", found.nodes)
    )


def problems(manifests: list[Manifest], folder: Path) -> list[str]:
    """All faults; `folder`: for the files that a command line names."""
    found = work(manifests)
    return [
        *pod_problems(manifests), *_said(found), *_nodes(manifests, found),
        *_kinds(manifests, found), *_policies(manifests, found), *_spot(found),
        *_commands(manifests, found, folder),
    ]  # fmt: skip


def pod_problems(manifests: list[Manifest]) -> list[str]:
    """Those of a pod that may do anything, or nothing."""
    found = work(manifests)
    return [
        *_references(manifests, found), *_mounts(found), *_profile(manifests, found),
        *_resources(found), *_images(found)
    ]  # fmt: skip


def _references(manifests: list[Manifest], found: Work) -> Iterator[str]:
    by_name = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
    spaces = {m["metadata"].get("namespace") for m in manifests if m["kind"] != "Namespace"}
    made = {m["metadata"]["name"] for m in manifests if m["kind"] == "Namespace"}
    if len(spaces) != 1 or (made and spaces != made):  # or one that is there already
        yield f"namespaces {spaces} are not the one that is made"
    volumes = {volume["name"]: volume for volume in found.pod["volumes"]}
    needed = [("ServiceAccount", found.pod.get("serviceAccountName"))]
    secrets = [volume["secret"] for volume in volumes.values() if "secret" in volume]
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume:
            needed.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        if "configMap" in volume:
            needed.append(("ConfigMap", volume["configMap"]["name"]))
    for container in found.containers:
        secrets += [source["secretRef"] for source in container.get("envFrom", [])]
        if missing := {mount["name"] for mount in container["volumeMounts"]} - set(volumes):
            yield f"container {container['name']} mounts {sorted(missing)}, which are no volumes"
    for manifest in manifests:
        kind, spec = manifest["kind"], manifest.get("spec", {})
        if kind == "ConfigMap" and not manifest.get("immutable"):
            yield f"ConfigMap {manifest['metadata']['name']} may change under a run"
        if kind == "Service":
            if not spec["selector"].items() <= found.labels.items():
                yield f"Service {manifest['metadata']['name']} selects no pod"
            if found.pod.get("subdomain") != manifest["metadata"]["name"]:
                yield (
                    f"pods are in the subdomain {found.pod.get('subdomain')}, "
                    "not in that of the Service"
                )
            if (spec.get("clusterIP"), spec.get("publishNotReadyAddresses")) != ("None", True):
                yield "the Service gives no names to pods that are not ready"
        if kind == "NetworkPolicy":
            peers = [
                peer["podSelector"]
                for rule in spec["ingress"]
                for peer in rule.get("from", [{"podSelector": {}}])
            ]
            for selector in [spec["podSelector"], *peers]:
                labels = selector.get("matchLabels", {})
                if not labels or not labels.items() <= found.labels.items():
                    yield "NetworkPolicy selects no pod, or all"
        if kind == "TrainJob":
            needed.append((spec["runtimeRef"]["kind"], spec["runtimeRef"]["name"]))
    yield from (
        f"there is no {kind} {name}" for kind, name in needed if (kind, name) not in by_name
    )
    if not all(secret.get("optional") for secret in secrets):
        yield "a Secret is not here, and not optional"


def _mounts(found: Work) -> Iterator[str]:
    for container in found.containers:
        mounts = {
            mount["mountPath"]: (
                mount["name"],
                mount.get("subPath"),
                not mount.get("readOnly", False),
            )
            for mount in container["volumeMounts"]
        }
        needed = (
            MOUNTS
            if container is found.node
            else {path: MOUNTS[path] for path in ("/runs", "/scratch")}
        )
        if {path: mounts.get(path) for path in needed} != needed:
            yield (
                f"container {container['name']} has not what it needs among {', '.join(needed)}, "
                "or may not write to it"
            )
    environment = {entry["name"]: entry.get("value", "") for entry in found.node.get("env", [])}
    if (
        not environment.get("HF_TOKEN_PATH", "").startswith("/tokens/")
        or environment.get("HF_HOME") != "/models"
    ):
        yield "tokens or models are looked for where nothing is mounted"
    [tokens] = [volume["secret"] for volume in found.pod["volumes"] if "secret" in volume]
    if tokens.get("defaultMode") != 0o440:
        yield "user 10001 may not read the tokens, or others may"
    if (environment.get("FINETUNE_NEEDS_GPU") == "1") != (GPU in found.node["resources"]["limits"]):
        yield "FINETUNE_NEEDS_GPU is not what the limits say"


def _spot(found: Work) -> Iterator[str]:
    environment = {entry["name"]: entry.get("value") for entry in found.node["env"]}
    if any(name.startswith("rdma/") for name in found.node["resources"]["limits"]) != (
        environment.get("NCCL_NET") == "IB"
    ):
        yield "a network card that NCCL does not insist on, or the other way round"
    if "karpenter.sh/do-not-disrupt" in found.job["template"].get("metadata", {}).get(
        "annotations", {}
    ):
        yield "Karpenter would not drain the node after a notice"
    for label, value in found.pod.get("nodeSelector", {}).items():
        wanted, seconds, is_tainted = SPOT.get(label, ("", 0, False))
        if value != wanted:
            yield f"no cloud's spot nodes are labelled {label}: {value}"
        if found.pod["terminationGracePeriodSeconds"] > seconds:
            yield (
                f"{found.pod['terminationGracePeriodSeconds']} s to end, "
                f"where the cloud gives {seconds}"
            )
        if is_tainted and not any(
            taint["key"] == label for taint in found.pod.get("tolerations", [])
        ):
            yield f"pods do not tolerate {label}"


def _kinds(manifests: list[Manifest], found: Work) -> Iterator[str]:
    """What controllers expect, or would take in another sense."""
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    if (
        "suspend" in by_kind[found.kind]["spec"]
        and "kueue.x-k8s.io/queue-name" not in by_kind[found.kind]["metadata"]["labels"]
    ):
        yield "suspended, and no queue would ever start it"
    if found.kind == "Job":
        return
    top = (
        by_kind["TrainingRuntime"]["spec"]["template"]
        if found.kind == "TrainJob"
        else by_kind["JobSet"]
    )
    [child], policy = top["spec"]["replicatedJobs"], top["spec"]["failurePolicy"]
    if child.get("replicas", 1) != 1 or child["name"] != "node":
        yield "the nodes are those of one Job, which is named node"
    names = {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    if top["spec"].get("network", names) != names:
        yield "nodes would not find the first one by its name"
    if policy.get("maxRestarts") != 20 or policy.get("restartStrategy") != "BlockingRecreate":
        yield "new pods would start beside old ones, or never"
    if found.kind == "TrainJob":
        order = [manifest["kind"] for manifest in manifests]
        if order.index("TrainingRuntime") > order.index("TrainJob"):
            yield "the TrainJob comes before its runtime, and would be refused"
        if (
            "torch" not in by_kind["TrainingRuntime"]["spec"]["mlPolicy"]
            or child["template"]["metadata"]["labels"].get(ANCESTOR) != "trainer"
        ):
            yield "nothing would tell the pods their PET_ variables"
        if "trainer" not in by_kind["TrainJob"]["spec"]:
            yield "Trainer's torch plugin gives PET_ variables only to a TrainJob with a trainer"
        if any(entry["name"].startswith("PET_") for entry in found.node["env"]):
            yield "PET_ variables are Trainer's to give"


def _nodes(manifests: list[Manifest], found: Work) -> Iterator[str]:
    job = found.job
    if found.nodes > 1:
        if not (
            job.get("completionMode") == "Indexed"
            and job["parallelism"] == job["completions"] == found.nodes
        ):
            yield (
                f"{found.nodes} nodes, but completionMode, parallelism and completions say "
                "something else"
            )
        if found.kind == "Job" and not any(manifest["kind"] == "Service" for manifest in manifests):
            yield "no Service gives the nodes their names"
        claims = [m for m in manifests if m["kind"] == "PersistentVolumeClaim"]
        if not any(claim["spec"]["accessModes"] == ["ReadWriteMany"] for claim in claims):
            yield "several nodes share no volume"
    elif job.get("parallelism", 1) != 1:
        yield "several pods would do the work of one"
    lasts = any(
        "persistentVolumeClaim" in volume
        for volume in found.pod["volumes"]
        if volume["name"] == "storage"
    )
    if not lasts and not any(
        argument.startswith("--checkpoint.storage") for argument in found.args
    ):
        yield "nothing that a run leaves behind outlives its pod"


def _said(found: Work) -> Iterator[str]:
    several = [
        ("Job", found.job),
        ("pod", found.pod),
        *(("container", container) for container in found.containers),
    ]
    for what, spec in several:
        if unknown := set(spec) - ALLOWED_FIELDS[what]:
            yield f"a {what} says {', '.join(sorted(unknown))}, which was never thought of"
    if len(found.pod["containers"]) != 1:
        yield "beside a second container a pod does not end with the run"


def _policies(manifests: list[Manifest], found: Work) -> Iterator[str]:
    pod, job = found.pod, found.job
    if found.kind == "Job" and job.get("backoffLimit") != (3 if found.nodes == 1 else 7):
        yield "a crash is not tried again three times"
    if found.kind != "TrainJob" and not next(m for m in manifests if m["kind"] == found.kind)[
        "spec"
    ].get("ttlSecondsAfterFinished"):
        yield "nothing removes it when it has ended"
    if pod.get("restartPolicy") != "Never":
        yield "podFailurePolicy needs restartPolicy: Never"
    if job.get("podReplacementPolicy") != "Failed":
        yield "a new pod would start beside the one that still saves"
    for rule in job.get("podFailurePolicy", {}).get("rules", []):
        codes = rule.get("onExitCodes", {}).get("values", [])
        if 0 in codes or codes != sorted(set(codes)):
            yield f"exit codes {codes}: Kubernetes wants them sorted, each once, without 0"
        named = rule.get("onExitCodes", {}).get("containerName")
        if named and named not in {container["name"] for container in found.containers}:
            yield "a rule names a container that is not there"
        if named and any(
            container["args"][0] == "launch" for container in pod.get("initContainers", [])
        ):
            yield "a rule does not see how a run before the last one ends"
    wanted = {
        "a wrong config (2)": (2, False, "ends"), "saved (75)": (75, False, "again"),
        "a crash (1)": (1, False, "counted"), "preempted, saved": (75, True, "again"),
        "preempted, killed": (137, True, "again"), "preempted at the start": (2, True, "again"),
    }  # fmt: skip
    for what, (code, disrupted, outcome) in wanted.items():
        if (got := fate(found, code, disrupted)) != outcome:
            yield f"{what}: {got}, not {outcome}"


def fate(found: Work, code: int, disrupted: bool) -> str:
    """Return the fate of a run whose pod ended so: it `ends`, starts `again`, or is `counted`."""
    action, message = "Count", ""
    # matchPodFailurePolicy in pkg/controller/job of Kubernetes 1.31 has the order, and the
    # messages.
    for index, rule in enumerate(found.job.get("podFailurePolicy", {}).get("rules", [])):
        conditions = [
            (condition["type"], condition["status"])
            for condition in rule.get("onPodConditions", [])
        ]
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        is_other = codes.get("containerName", "node") != "node"
        if disrupted and ("DisruptionTarget", "True") in conditions:
            action = rule["action"]
            message = (
                f"Pod ns/x has condition DisruptionTarget matching {action} rule at index {index}"
            )
            break
        if (
            not is_other
            and codes["values"]
            and (code in codes["values"]) == (codes["operator"] == "In")
        ):
            action = rule["action"]
            message = (
                f"Container node for pod ns/x failed with exit code {code} matching {action} rule "
                f"at index {index}"
            )
            break
    if found.kind == "Job":
        return {"Ignore": "again", "FailJob": "ends", "Count": "counted"}[action]
    if action == "Ignore" or (action == "Count" and found.job["backoffLimit"] != 0):
        return "one pod is replaced, the others wait"
    reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
    for rule in found.failure_policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]) and any(
            re.search(p, message) for p in patterns
        ):
            known = {
                "FailJobSet": "ends",
                "RestartJobSetAndIgnoreMaxRestarts": "again",
                "RestartJobSet": "counted",
            }
            return known[rule["action"]]
    return "counted"


def _profile(manifests: list[Manifest], found: Work) -> Iterator[str]:
    """The Pod Security Standard "restricted"."""
    for namespace in [manifest for manifest in manifests if manifest["kind"] == "Namespace"]:
        if (
            namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
            != "restricted"
        ):
            yield "the namespace does not enforce the restricted profile"
    if found.pod.get("automountServiceAccountToken") is not False:
        yield "pods get a token of the service account, which they do not need"
    if found.pod.get("securityContext") != POD_SECURITY:
        yield f"the pod's securityContext is {found.pod.get('securityContext')}"
    for container in found.containers:
        if container.get("securityContext") != CONTAINER_SECURITY:
            yield (
                f"container {container['name']}: "
                f"securityContext is {container.get('securityContext')}"
            )
    for volume in found.pod["volumes"]:
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"volume {volume['name']} is of a kind that is not restricted"


def _resources(found: Work) -> Iterator[str]:
    for container in found.containers:
        asked = container.get("resources", {})
        if not all(
            {"cpu", "memory", "ephemeral-storage"} <= set(asked.get(side, {}))
            for side in ("requests", "limits")
        ):
            yield (
                f"container {container['name']} asks for no cpu, memory and disk, or has no limits"
            )
        elif asked["requests"]["memory"] != asked["limits"]["memory"]:
            yield f"container {container['name']} may be given less memory than it counts on"
        if asked.get("requests", {}).get(GPU) != asked.get("limits", {}).get(GPU):
            yield f"container {container['name']}: GPUs of requests and limits differ"
    volumes = {volume["name"]: volume.get("emptyDir") for volume in found.pod["volumes"]}
    for name, folder in volumes.items():
        if folder is not None and "sizeLimit" not in folder:
            yield f"volume {name} may fill the node's disk"
    on_disk = sum(
        amount(folder["sizeLimit"])
        for folder in volumes.values()
        if folder and "medium" not in folder and "sizeLimit" in folder
    )
    if on_disk > amount(found.node["resources"].get("limits", {}).get("ephemeral-storage", "0")):
        yield "folders may hold more than the pod has asked for"
    shared = volumes.get("shm") or {}
    memory = found.node["resources"].get("limits", {}).get("memory", "0")
    if shared.get("medium") != "Memory" or amount(shared["sizeLimit"]) > amount(memory) / 4:
        yield "/dev/shm is not memory, or more than a quarter of the limit, which it counts against"


def amount(quantity: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", quantity).groups()
    return float(number) * UNITS[unit]


def _images(found: Work) -> Iterator[str]:
    images = {container["image"] for container in found.containers}
    if len(images) > 1:
        yield f"containers of one run have several images: {sorted(images)}"
    for image in images:
        tag = image.rpartition("/")[2].partition(":")[2]
        if "@sha256:" not in image and tag in ("", "latest"):
            yield f"image {image} is not one that stays the same"


def _commands(manifests: list[Manifest], found: Work, folder: Path) -> Iterator[str]:
    """Parse every command line with the real parsers: the launcher's per node, train.py's else."""
    processes: set[str] = set()
    grace = found.pod["terminationGracePeriodSeconds"]
    given_gpus = int(found.node["resources"]["limits"].get(GPU, 0))
    for container, nodes in [
        *((c, 1) for c in found.pod.get("initContainers", [])),
        (found.node, found.nodes),
    ]:
        for rank in range(nodes):
            args = found.args if container is found.node else container["args"]
            try:
                words = [expanded(word, environment(found, container, rank)) for word in args]
            except KeyError as exc:
                yield f"nothing says what $({exc.args[0]}) is"
                return
            if not container.get("command") and words[0] != "launch":
                yield f"{container['name']}: finetune has no command {words[0]} that trains"
                return
            if container.get("command"):  # a script of ours, which has its own tests
                if not Path(container["command"][1]).is_file():
                    yield f"there is no {container['command'][1]}"
                continue
            try:
                environments, command = launcher.read(words[1:])
                config, _ = configs.parse(_with_files(command[2:], manifests, found, folder))
            except UserError as exc:
                yield f"{container['name']}: {exc}"
                return
            if container is found.node:
                processes |= {environment.get("RANK", "0") for environment in environments}
                if nodes > 1 and environments[0]["MASTER_ADDR"] != found.first_node:
                    yield (
                        f"nodes look for {environments[0]['MASTER_ADDR']}, "
                        f"the first one is {found.first_node}"
                    )
                if len(environments) != max(given_gpus, 1):
                    yield f"{len(environments)} processes on a node of {given_gpus} GPUs"
    world = found.nodes * max(given_gpus, 1)
    if processes != {str(rank) for rank in range(world)}:
        yield f"{len(processes)} processes, where {found.nodes} nodes have {world} places"
    try:
        accumulation_steps(config, world)
    except UserError as exc:
        yield str(exc)
    if not config.checkpoint.grace_seconds < grace:
        yield (
            f"the run counts on {config.checkpoint.grace_seconds:g} s after SIGTERM, "
            f"the pod has {grace}"
        )


def environment(found: Work, container: Manifest, rank: int) -> dict[str, str]:
    """What a container of the node `rank` finds, as far as command lines ask for it."""
    own = {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
    if any(
        source["secretRef"]["name"] == "object-store" for source in container.get("envFrom", [])
    ):
        own["STORAGE"] = "s3://bucket/runs"
    if found.job.get("completionMode") == "Indexed":
        own["JOB_COMPLETION_INDEX"] = str(rank)
    if found.kind == "TrainJob":  # what its torch plugin puts in, in its own words
        train_job = found.name.removesuffix("-node-0")
        own |= {
            "PET_NNODES": str(found.nodes),
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": f"{train_job}-node-0-0.{train_job}",
        }
    return own


def expanded(word: str, environment: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], word)


def _with_files(
    words: list[str], manifests: list[Manifest], found: Work, folder: Path
) -> list[str]:
    """/config/x becomes a file with what the ConfigMap has under x."""
    name = next(
        volume["configMap"]["name"] for volume in found.pod["volumes"] if "configMap" in volume
    )
    [files] = [
        m["data"] for m in manifests if (m["kind"], m["metadata"]["name"]) == ("ConfigMap", name)
    ] or [{}]
    for file, text in files.items():
        (folder / file).write_text(text)
    return [re.sub(r"(^|=)/config/", rf"\g<1>{folder}/", word) for word in words]
