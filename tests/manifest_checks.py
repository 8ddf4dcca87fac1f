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
FATES = {
    "FailJobSet": "ends",
    "RestartJobSetAndIgnoreMaxRestarts": "again",
    "RestartJobSet": "counted",
}
ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def render(folder: Path) -> list[Manifest]:
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Kustomize writes tens of thousands of lines: the parser in C takes a tenth of the time.
    return [manifest for manifest in yaml.load_all(done.stdout, yaml.CSafeLoader) if manifest]


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
        of_set = self.name.removesuffix("-node-0")
        return f"{self.name}-0.{self.pod.get('subdomain') if self.kind == 'Job' else of_set}"

    @property
    def pod(self) -> Manifest:
        return self.job["template"]["spec"]

    @property
    def node(self) -> Manifest:
        return next(each for each in self.pod["containers"] if each["name"] == "node")

    @property
    def containers(self) -> list[Manifest]:
        return [*self.pod.get("initContainers", []), *self.pod["containers"]]

    @property
    def limits(self) -> dict[str, str]:
        return self.node["resources"].get("limits", {})

    @property
    def variables(self) -> dict[str, str]:
        return {entry["name"]: entry.get("value", "") for entry in self.node.get("env", [])}

    @property
    def metadata(self) -> Manifest:
        """Labels and annotations of its pods."""
        return self.job["template"].get("metadata", {})

    @property
    def labels(self) -> dict[str, str]:
        """Those that the controllers add, too."""
        return {**self.metadata.get("labels", {}), "batch.kubernetes.io/job-name": self.name}


def work(manifests: list[Manifest]) -> Work:
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    if job := by_kind.get("Job"):
        spec = job["spec"]
        found = Work("Job", job["metadata"]["name"], spec, [], spec.get("completions", 1), {})
    else:
        kind = "TrainJob" if "TrainJob" in by_kind else "JobSet"
        jobs = _job_set(by_kind)
        [child] = jobs["replicatedJobs"]
        name = f"{by_kind[kind]['metadata']['name']}-{child['name']}-0"
        spec = child["template"]["spec"]
        found = Work(kind, name, spec, [], spec["completions"], jobs["failurePolicy"])
    trainer = by_kind.get("TrainJob", {}).get("spec", {}).get("trainer", {})
    nodes = trainer.get("numNodes", found.nodes)
    return replace(found, args=found.node.get("args", []), nodes=nodes)


def _job_set(by_kind: dict[str, Manifest]) -> Manifest:
    """The spec of the JobSet, perhaps inside the runtime of a TrainJob."""
    runtime = by_kind.get("TrainingRuntime", {}).get("spec", {}).get("template")
    return (runtime or by_kind["JobSet"])["spec"]


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
            yield f"container {container['name']} mounts undefined volumes {sorted(missing)}"
    if not all(secret.get("optional") for secret in secrets):
        yield "a Secret is not here, and not optional"
    for manifest in manifests:
        kind, spec = manifest["kind"], manifest.get("spec", {})
        if kind == "ConfigMap" and not manifest.get("immutable"):
            yield f"ConfigMap {manifest['metadata']['name']} may change under a run"
        if kind == "Service":
            yield from _service(manifest["metadata"]["name"], spec, found)
        if kind == "NetworkPolicy":
            anybody = [{"podSelector": {}}]
            peers = [peer for rule in spec["ingress"] for peer in rule.get("from", anybody)]
            for selector in [spec["podSelector"], *(peer["podSelector"] for peer in peers)]:
                labels = selector.get("matchLabels", {})
                if not labels or not labels.items() <= found.labels.items():
                    yield "NetworkPolicy selects no pod, or all"
        if kind == "TrainJob":
            needed.append((spec["runtimeRef"]["kind"], spec["runtimeRef"]["name"]))
    for kind, name in needed:
        if (kind, name) not in by_name:
            yield f"no {kind} is named {name}"


def _service(name: str, spec: Manifest, found: Work) -> Iterator[str]:
    subdomain = found.pod.get("subdomain")
    if not spec["selector"].items() <= found.labels.items():
        yield f"Service {name} selects no pod"
    if subdomain != name:
        yield f"pods are in the subdomain {subdomain}, not in that of the Service"
    if (spec.get("clusterIP"), spec.get("publishNotReadyAddresses")) != ("None", True):
        yield "the Service gives no names to pods that are not ready"


def _mounts(found: Work) -> Iterator[str]:
    for container in found.containers:
        mounts = {
            mount["mountPath"]: (mount["name"], mount.get("subPath"), not mount.get("readOnly"))
            for mount in container["volumeMounts"]
        }
        paths = MOUNTS if container is found.node else ["/runs", "/scratch"]
        if any(mounts.get(path) != MOUNTS[path] for path in paths):
            yield (
                f"container {container['name']} has not what it needs among {', '.join(paths)}, "
                "or may not write to it"
            )
    variables = found.variables
    tokens_are_there = variables.get("HF_TOKEN_PATH", "").startswith("/tokens/")
    if not tokens_are_there or variables.get("HF_HOME") != "/models":
        yield "tokens or models are looked for where nothing is mounted"
    [tokens] = [volume["secret"] for volume in found.pod["volumes"] if "secret" in volume]
    if tokens.get("defaultMode") != 0o440:
        yield "user 10001 may not read the tokens, or others may"
    if (variables.get("FINETUNE_NEEDS_GPU") == "1") != (GPU in found.limits):
        yield "FINETUNE_NEEDS_GPU is not what the limits say"


def _spot(found: Work) -> Iterator[str]:
    has_card = any(name.startswith("rdma/") for name in found.limits)
    if has_card != (found.variables.get("NCCL_NET") == "IB"):
        yield "a network card that NCCL does not insist on, or the other way round"
    if "karpenter.sh/do-not-disrupt" in found.metadata.get("annotations", {}):
        yield "Karpenter would not drain the node after a notice"
    grace = found.pod["terminationGracePeriodSeconds"]
    tolerated = {taint["key"] for taint in found.pod.get("tolerations", [])}
    for label, value in found.pod.get("nodeSelector", {}).items():
        wanted, seconds, is_tainted = SPOT.get(label, ("", 0, False))
        if value != wanted:
            yield f"no cloud's spot nodes are labelled {label}: {value}"
        if grace > seconds:
            yield f"{grace} s to end, where the cloud gives {seconds}"
        if is_tainted and label not in tolerated:
            yield f"pods do not tolerate {label}"


def _kinds(manifests: list[Manifest], found: Work) -> Iterator[str]:
    """What controllers expect, or would take in another sense."""
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    top = by_kind[found.kind]
    is_queued = "kueue.x-k8s.io/queue-name" in top["metadata"].get("labels", {})
    if "suspend" in top["spec"] and not is_queued:
        yield "suspended, and no queue would ever start it"
    if found.kind == "Job":
        return
    jobs = _job_set(by_kind)
    [child], policy = jobs["replicatedJobs"], jobs["failurePolicy"]
    if child.get("replicas", 1) != 1 or child["name"] != "node":
        yield "the nodes are those of one Job, which is named node"
    names = {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    if jobs.get("network", names) != names:
        yield "nodes would not find the first one by its name"
    if policy.get("maxRestarts") != 20 or policy.get("restartStrategy") != "BlockingRecreate":
        yield "new pods would start beside old ones, or never"
    if found.kind == "TrainJob":
        order = [manifest["kind"] for manifest in manifests]
        if order.index("TrainingRuntime") > order.index("TrainJob"):
            yield "the TrainJob comes before its runtime, and would be refused"
        step = child["template"]["metadata"]["labels"].get(ANCESTOR)
        if "torch" not in by_kind["TrainingRuntime"]["spec"]["mlPolicy"] or step != "trainer":
            yield "nothing would tell the pods their PET_ variables"
        if "trainer" not in top["spec"]:
            yield "Trainer's torch plugin gives PET_ variables only to a TrainJob with a trainer"
        if any(name.startswith("PET_") for name in found.variables):
            yield "PET_ variables are Trainer's to give"


def _nodes(manifests: list[Manifest], found: Work) -> Iterator[str]:
    job = found.job
    if found.nodes > 1:
        counts = (job.get("completionMode"), job["parallelism"], job["completions"])
        if counts != ("Indexed", found.nodes, found.nodes):
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
    [storage] = [volume for volume in found.pod["volumes"] if volume["name"] == "storage"]
    is_stored = any(argument.startswith("--checkpoint.storage") for argument in found.args)
    if "persistentVolumeClaim" not in storage and not is_stored:
        yield "nothing that a run leaves behind outlives its pod"


def _said(found: Work) -> Iterator[str]:
    containers = [("container", container) for container in found.containers]
    for what, spec in [("Job", found.job), ("pod", found.pod), *containers]:
        if unknown := set(spec) - ALLOWED_FIELDS[what]:
            yield f"a {what} says {', '.join(sorted(unknown))}, which was never thought of"
    if len(found.pod["containers"]) != 1:
        yield "beside a second container a pod does not end with the run"


def _policies(manifests: list[Manifest], found: Work) -> Iterator[str]:
    pod, job = found.pod, found.job
    if found.kind == "Job" and job.get("backoffLimit") != (3 if found.nodes == 1 else 7):
        yield "a crash is not tried again three times"
    [top] = [manifest["spec"] for manifest in manifests if manifest["kind"] == found.kind]
    if found.kind != "TrainJob" and not top.get("ttlSecondsAfterFinished"):
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
        before = pod.get("initContainers", [])
        if named and any(container["args"][0] == "launch" for container in before):
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
    # The order and the messages of matchPodFailurePolicy in pkg/controller/job, Kubernetes 1.31.
    for index, rule in enumerate(found.job.get("podFailurePolicy", {}).get("rules", [])):
        conditions = [(each["type"], each["status"]) for each in rule.get("onPodConditions", [])]
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        is_other = codes.get("containerName", "node") != "node"
        is_listed = (code in codes["values"]) == (codes["operator"] == "In")
        if disrupted and ("DisruptionTarget", "True") in conditions:
            found_in = "Pod ns/x has condition DisruptionTarget"
        elif not is_other and codes["values"] and is_listed:
            found_in = f"Container node for pod ns/x failed with exit code {code}"
        else:
            continue
        action = rule["action"]
        message = f"{found_in} matching {action} rule at index {index}"
        break
    if found.kind == "Job":
        return {"Ignore": "again", "FailJob": "ends", "Count": "counted"}[action]
    if action == "Ignore" or (action == "Count" and found.job["backoffLimit"] != 0):
        return "one pod is replaced, the others wait"
    reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
    for rule in found.failure_policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        is_matched = any(re.search(pattern, message) for pattern in patterns)
        if reason in rule.get("onJobFailureReasons", [reason]) and is_matched:
            return FATES[rule["action"]]
    return "counted"


def _profile(manifests: list[Manifest], found: Work) -> Iterator[str]:
    """The Pod Security Standard "restricted"."""
    for namespace in [manifest for manifest in manifests if manifest["kind"] == "Namespace"]:
        labels = namespace["metadata"]["labels"]
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce the restricted profile"
    if found.pod.get("automountServiceAccountToken") is not False:
        yield "pods get a token of the service account, which they do not need"
    if found.pod.get("securityContext") != POD_SECURITY:
        yield f"the pod's securityContext is {found.pod.get('securityContext')}"
    for container in found.containers:
        security = container.get("securityContext")
        if security != CONTAINER_SECURITY:
            yield f"container {container['name']}: securityContext is {security}"
    for volume in found.pod["volumes"]:
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"volume {volume['name']} is of a kind that is not restricted"


def _resources(found: Work) -> Iterator[str]:
    for container in found.containers:
        name, asked = container["name"], container.get("resources", {})
        requests, limits = asked.get("requests", {}), asked.get("limits", {})
        if not {"cpu", "memory", "ephemeral-storage"} <= set(requests) & set(limits):
            yield f"container {name} asks for no cpu, memory and disk, or has no limits"
        elif requests["memory"] != limits["memory"]:
            yield f"container {name} may be given less memory than it counts on"
        if requests.get(GPU) != limits.get(GPU):
            yield f"container {name}: GPUs of requests and limits differ"
    folders = {v["name"]: v["emptyDir"] for v in found.pod["volumes"] if "emptyDir" in v}
    for name, folder in folders.items():
        if "sizeLimit" not in folder:
            yield f"volume {name} may fill the node's disk"
    on_disk = [folder for folder in folders.values() if "medium" not in folder]
    total = sum(amount(folder.get("sizeLimit", "0")) for folder in on_disk)
    if total > amount(found.limits.get("ephemeral-storage", "0")):
        yield "folders may hold more than the pod has asked for"
    shared, memory = folders.get("shm", {}), amount(found.limits.get("memory", "0"))
    if shared.get("medium") != "Memory" or amount(shared["sizeLimit"]) > memory / 4:
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
    given_gpus = int(found.limits.get(GPU, 0))
    before = [(container, 1) for container in found.pod.get("initContainers", [])]
    for container, nodes in [*before, (found.node, found.nodes)]:
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
                    yield f"the image has no {container['command'][1]}"
                continue
            try:
                environments, command = launcher.read(words[1:])
                config, _ = configs.parse(_with_files(command[2:], manifests, found, folder))
            except UserError as exc:
                yield f"{container['name']}: {exc}"
                return
            if container is found.node:
                processes |= {environment.get("RANK", "0") for environment in environments}
                first = environments[0].get("MASTER_ADDR")
                if nodes > 1 and first != found.first_node:
                    yield f"nodes look for {first}, the first one is {found.first_node}"
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
    secrets = [source["secretRef"]["name"] for source in container.get("envFrom", [])]
    if "object-store" in secrets:
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
    [name] = [each["configMap"]["name"] for each in found.pod["volumes"] if "configMap" in each]
    of_name = [
        m["data"] for m in manifests if m["kind"] == "ConfigMap" and m["metadata"]["name"] == name
    ]
    for file, text in (of_name or [{}])[0].items():
        (folder / file).write_text(text)
    return [re.sub(r"(^|=)/config/", rf"\g<1>{folder}/", word) for word in words]
