"""One server over three hosts, started by the very files of deploy/: Slurm's own programs run the batch script, and the
pods' command lines run as a kubelet would run them."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from checkpoints import checkpoint, hf_greedy, random_prompts
from launch.hosts import Hosts, hosts
from launch.slurm import PROGRAMS, slurm

CAN_MAKE_HOSTS = os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("unshare") is not None
pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="network namespaces need root, ip and unshare"),
]

DEPLOY = Path(__file__).parents[2] / "deploy"
KEY = "a-key-for-this-test"
TOKENS = 40
ON_A_CPU = {
    # The files leave these to the environment; `leanserve` is the one that runs this test.
    "LEANSERVE_DEVICE": "cpu",
    "LEANSERVE_KV_MEMORY": "8MiB",
    "LEANSERVE_PAGE_TOKENS": "16",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def wait_for(what: Callable[[], bool], timeout_s: float, log: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if what():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"not within {timeout_s:g} s\n{log()}")


def assert_serves(net: Hosts, model_dir: Path, log: Callable[[], str]) -> None:
    """The three hosts' ranks answer as one, and as transformers does."""
    url = f"http://{net.address(0)}:8000"
    wait_for(lambda: httpx.get(f"{url}/ready", timeout=5).status_code == 200, 120, log)

    def ranks() -> dict[int, int]:
        return {rank["rank"]: rank["pid"] for rank in httpx.get(f"{url}/health").json()["ranks"]}

    wait_for(lambda: len(ranks()) == 3, 20, log)
    assert all(pid in net.processes(rank) for rank, pid in ranks().items()), "rank N is on host N"
    (prompt,) = random_prompts([70], seed=8)
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
    answer = httpx.post(
        f"{url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ).json()
    (expected,) = hf_greedy(model_dir, [prompt], TOKENS)
    assert answer["choices"][0]["token_ids"] == expected


@pytest.mark.skipif(any(shutil.which(name) is None for name in PROGRAMS), reason="Slurm is not installed")
def test_slurms_batch_script(tmp_path_factory: pytest.TempPathFactory) -> None:
    model_dir = checkpoint(tmp_path_factory, "llama")
    script = DEPLOY / "slurm" / "leanserve.sbatch"
    with hosts(3) as net, slurm(net) as cluster:

        def submit() -> str:
            environment = ON_A_CPU | {"LEANSERVE_API_KEYS": KEY}
            said = cluster.command("sbatch", "--nodes", "3", str(script), str(model_dir), environment=environment)
            return said.split()[-1]

        def is_told(job: str, *facts: str) -> bool:
            told = cluster.command("scontrol", "show", "job", job)
            return all(fact in told for fact in facts)

        job = submit()
        assert_serves(net, model_dir, cluster.log)
        assert "is no option" not in cluster.log(), "a variable of the script is taken for one of ours"
        cluster.command("scancel", "--signal=TERM", "--batch", job)
        wait_for(lambda: is_told(job, "JobState=COMPLETED"), 60, cluster.log)

        job = submit()
        assert_serves(net, model_dir, cluster.log)
        cluster.command("scancel", "--signal=USR1", "--batch", job)  # as Slurm does before the time limit
        wait_for(lambda: is_told(job, "JobState=PENDING", "Restarts=1"), 60, cluster.log)
        cluster.command("scancel", job)


def test_the_pods_of_a_leader_worker_set(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    model_dir = checkpoint(tmp_path_factory, "llama")
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    overlay = DEPLOY / "kubernetes" / "overlays" / "multi-node"
    built = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, check=True).stdout
    resources = {resource["kind"]: resource for resource in yaml.safe_load_all(built)}
    group = resources["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    logs = [tmp_path / f"pod-{host}" for host in range(3)]
    with hosts(3) as net:
        pods = []
        for host, log in enumerate(logs):
            pod = group["leaderTemplate" if host == 0 else "workerTemplate"]["spec"]
            # What LeaderWorkerSet puts into each container; the leader's address is a name.
            environment = {
                "LWS_LEADER_ADDRESS": net.name(0),
                "LWS_GROUP_SIZE": str(net.count),
                "LWS_WORKER_INDEX": str(host),
            }
            command = ["bash", "-c", 'exec "$@"', "bash", *entry_point(), *arguments(pod, environment)]
            environment |= ON_A_CPU | {"LEANSERVE_MODEL": str(model_dir)}
            volumes = mount_files(pod, resources["ConfigMap"], tmp_path / f"root-{host}")
            pods.append(net.run(host, command, log, environment, before=volumes))
        try:
            assert_serves(net, model_dir, lambda: "\n".join(log.read_text() for log in logs))
            pods[0].terminate()  # as the kubelet ends it
            assert [pod.wait(60) for pod in pods] == [0, 0, 0]
        finally:
            for pod in pods:
                pod.kill()
                pod.wait()


def entry_point() -> list[str]:
    """Of the image, without tini, which hands signals on and no more."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (words,) = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    tini, dashes, *command = yaml.safe_load(words)
    assert (tini, dashes) == ("tini", "--")
    return command


def arguments(pod: dict[str, Any], environment: dict[str, str]) -> list[str]:
    """With each $(NAME) filled in."""
    (container,) = pod["containers"]
    return [re.sub(r"\$\((\w+)\)", lambda name: environment[name[1]], word) for word in container["args"]]


def mount_files(pod: dict[str, Any], config_map: dict[str, Any], root: Path) -> str:
    """Shell that puts the pod's configuration and its secret where its container mounts them."""
    paths = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    files: dict[str, dict[str, str]] = {}
    for volume in pod["volumes"]:
        if volume.get("configMap", {}).get("name") == config_map["metadata"]["name"]:
            files[paths[volume["name"]]] = config_map["data"]
        elif volume.get("secret", {}).get("secretName") == "leanserve-api-key":
            files[paths[volume["name"]]] = {"api-key": KEY}
    assert files.keys() == {"/etc/leanserve", "/run/secrets/leanserve"}
    lines = [f"cp -a /etc {root}-etc", f"mount --bind {root}-etc /etc", "mount -t tmpfs tmpfs /run"]
    for path, content in files.items():
        (root / path[1:]).mkdir(parents=True)
        for name, text in content.items():
            (root / path[1:] / name).write_text(text)
        lines += [f"mkdir -p {path}", f"mount --bind {root / path[1:]} {path}"]
    return "\n".join(lines)
