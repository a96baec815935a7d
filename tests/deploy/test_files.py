"""Every file under deploy/ is checked by the tool that knows its format, and names only what leanserve has."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from leanserve.server.errors import plain_reply

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("single-node", "multi-node", "cpu")
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "leanserve.json").read_text())


def run(*command: str | Path) -> str:
    """Output of a checker that passed.

    Skips where the program is not installed; fails with what it says where it does not pass.
    """
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_dockerfile_is_clean() -> None:
    run("hadolint", DEPLOY / "Dockerfile")


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for names in copied for name in names.split()} == kept
    assert all((ROOT / name).exists() for name in kept)


def test_compose_follows_its_specification() -> None:
    run(
        sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml"
    )  # fmt: skip


def test_what_compose_mounts_exists() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    sources = {
        volume.split(":")[0] for service in services.values() for volume in service["volumes"] if volume.startswith(".")
    }
    assert sources
    assert all((DEPLOY / source).is_dir() for source in sources)


@pytest.mark.parametrize("script", sorted(DEPLOY.rglob("*.sbatch")), ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    run("shellcheck", script)


@pytest.mark.system
def test_the_unit_is_clean(tmp_path: Path) -> None:
    unit = (DEPLOY / "systemd" / "leanserve.service").read_text()
    assert "ExecStart=/var/lib/leanserve/venv/bin/leanserve " in unit
    # systemd looks whether the program is there.
    (tmp_path / "leanserve.service").write_text(unit.replace("/var/lib/leanserve/venv/bin/leanserve", "/bin/true"))
    assert run("systemd-analyze", "verify", tmp_path / "leanserve.service") == ""


@pytest.mark.system
def test_nginx_takes_its_configuration(tmp_path: Path) -> None:
    run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=llm.example.org",
        "-keyout", tmp_path / "privkey.pem", "-out", tmp_path / "fullchain.pem",
    )  # fmt: skip
    site = (DEPLOY / "nginx" / "leanserve.conf").read_text().replace("/etc/ssl/leanserve", str(tmp_path))
    (tmp_path / "site.conf").write_text(site)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; include {tmp_path}/site.conf; }}"
    )
    run("nginx", "-t", "-c", tmp_path / "nginx.conf")


@pytest.mark.system
def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    prometheus = DEPLOY / "prometheus"
    run("promtool", "check", "rules", prometheus / "alerts.yml")
    run("promtool", "test", "rules", prometheus / "alerts_test.yml")


@pytest.mark.system
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "api-key").write_text("k")
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", tmp_path)
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets/api-key", str(tmp_path / "api-key")))
    run("promtool", "check", "config", tmp_path / "prometheus.yml")


@pytest.mark.system
def test_the_dashboards_queries_parse(tmp_path: Path) -> None:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    filled = [text.replace("$__rate_interval", "1m").replace("$model", ".*") for text in expressions]
    assert not any("$" in text for text in filled)
    rules = [{"record": f"panel:{i}", "expr": text} for i, text in enumerate(filled)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run("promtool", "check", "rules", tmp_path / "rules.yml")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_every_alert_has_a_test_and_a_page_in_the_runbook(alert: dict) -> None:
    name = alert["alert"]
    assert f"\n### {name}\n" in (DEPLOY / "README.md").read_text()
    assert alert["annotations"]["runbook"] == f"deploy/README.md#{name.lower()}"
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    fired = [case["alertname"] for test in tests for case in test["alert_rule_test"] if "exp_alerts" in case]
    assert fired.count(name) == 1


def test_every_error_code_is_explained() -> None:
    sources = [path.read_text() for path in (ROOT / "leanserve").rglob("*.py")]
    assert not any('code=f"' in text for text in sources), "codes are written out, to be found"
    codes = {code for text in sources for code in re.findall(r'\bcode="([a-z_]+)"', text)}
    codes |= {str(plain_reply(status, "").code) for status in (404, 405)}  # the router's own
    _, table = (DEPLOY / "README.md").read_text().split("## Error codes")
    assert len(codes) > 10
    assert set(re.findall(r"`([a-z_]+)`", table.replace("max_tokens", ""))) >= codes


@pytest.mark.system
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_build_and_fit_the_api(overlay: str) -> None:
    for resource in yaml.safe_load_all(run("kubectl", "kustomize", KUBERNETES / "overlays" / overlay)):
        if resource["kind"] == "LeaderWorkerSet":
            check_leader_worker_set(resource)
        else:
            kubernetes_validate.validate(resource, "1.37", strict=True)


def test_single_files_fit_the_api() -> None:
    for path in (
        *KUBERNETES.glob("base/*.yaml"),
        *KUBERNETES.glob("overlays/*/*.yaml"),
        *KUBERNETES.glob("examples/*"),
    ):
        resource = yaml.safe_load(path.read_text())
        match resource.get("kind"):
            case None | "Kustomization":
                pass
            case "LeaderWorkerSet":
                check_leader_worker_set(resource)
            case "InferencePool":
                jsonschema.validate(resource, INFERENCE_POOL)
            case _:
                kubernetes_validate.validate(resource, "1.37", strict=True)


def exactly(**properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT, COUNT, LABELS = {"type": "string"}, {"type": "integer", "minimum": 1}, {"type": "object"}
# Of these two custom resources, the fields that our files use, as their v1 definitions have them.
LEADER_WORKER_SET = exactly(
    apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
    kind={"const": "LeaderWorkerSet"},
    metadata={"type": "object"},
    spec=exactly(
        replicas=COUNT,
        leaderWorkerTemplate=exactly(
            size=COUNT,
            restartPolicy={"enum": ["Default", "RecreateGroupOnPodRestart", "None"]},
            leaderTemplate=exactly(metadata={"type": "object"}, spec={"type": "object"}),
            workerTemplate=exactly(metadata={"type": "object"}, spec={"type": "object"}),
        ),
    ),
)
INFERENCE_POOL = exactly(
    apiVersion={"const": "inference.networking.k8s.io/v1"},
    kind={"const": "InferencePool"},
    metadata={"type": "object"},
    spec=exactly(
        selector=exactly(matchLabels=LABELS),
        targetPorts={"type": "array", "minItems": 1, "items": exactly(number=COUNT)},
        endpointPickerRef=exactly(name=TEXT, port=exactly(number=COUNT)),
    ),
)


def check_leader_worker_set(resource: dict) -> None:
    jsonschema.validate(resource, LEADER_WORKER_SET)
    templates = resource["spec"]["leaderWorkerTemplate"]
    for name in ("leaderTemplate", "workerTemplate"):
        pod = {"apiVersion": "v1", "kind": "Pod", **templates[name]}
        kubernetes_validate.validate(pod, "1.37", strict=True)
    leader, worker = (templates[name]["spec"]["containers"][0]["args"] for name in ("leaderTemplate", "workerTemplate"))
    assert leader == worker


@pytest.mark.system
def test_the_group_mounts_the_configuration_that_kustomize_named() -> None:
    resources = list(yaml.safe_load_all(run("kubectl", "kustomize", KUBERNETES / "overlays" / "multi-node")))
    (config,) = [resource["metadata"]["name"] for resource in resources if resource["kind"] == "ConfigMap"]
    (group,) = [resource for resource in resources if resource["kind"] == "LeaderWorkerSet"]
    for template in ("leaderTemplate", "workerTemplate"):
        volumes = group["spec"]["leaderWorkerTemplate"][template]["spec"]["volumes"]
        assert [volume["configMap"]["name"] for volume in volumes if "configMap" in volume] == [config]


def options_of(command: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", "leanserve", command, "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[a-z][a-z-]+", done.stdout))


def test_every_option_named_exists() -> None:
    options = options_of("serve")
    commands = {
        "Dockerfile": r"^CMD .*$",
        "compose.yaml": r"^  command: .*$",
        "systemd/leanserve.service": r"^ExecStart=.*$",
        "slurm/leanserve.sbatch": r"^    exec leanserve.*\n.*$",
        "kubernetes/overlays/multi-node/leader-worker-set.yaml": r"^ +- --.*$",
        "kubernetes/overlays/single-node/deployment.yaml": r"^ +args: .*$",
    }
    for file, pattern in commands.items():
        found = re.findall(pattern, (DEPLOY / file).read_text(), re.MULTILINE)
        assert found, file
        named = {option for text in found for option in re.findall(r"--[a-z][a-z-]+", text)}
        assert named
        assert named <= options, file
    settings = yaml.safe_load((KUBERNETES / "base" / "config.yaml").read_text())
    assert {f"--{name}" for name in settings} <= options


WHOLLY_RUN = {
    "README.md", "Dockerfile.dockerignore", "nginx/leanserve.conf",
    "prometheus/alerts.yml", "prometheus/alerts_test.yml", "prometheus/prometheus.yml",
}  # fmt: skip


def test_files_that_were_not_run_say_so_at_their_top() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.name != "api-key" and str(path.relative_to(DEPLOY)) not in WHOLLY_RUN:
            top = "".join(path.read_text().splitlines(keepends=True)[:13])
            assert re.search(r"[Nn]ot (run|built|started by systemd) here", top), path
