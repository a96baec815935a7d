"""Flag, then environment, then file, then default; and what is wrong is said with what is allowed."""

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from leanserve.__main__ import app
from leanserve.contracts.errors import ConfigError
from leanserve.launch.access import AccessOptions
from leanserve.launch.configured_command import ConfiguredCommand, use_config_file
from leanserve.launch.front_end import ServeOptions
from leanserve.launch.options import LaunchOptions
from leanserve.launch.own_address import is_loopback


def run(*arguments: str, **environment: str) -> tuple[dict[str, object], str]:
    """What the command was called with, and what it printed."""
    app = typer.Typer()
    called: dict[str, object] = {}

    @app.callback()
    def root() -> None:
        pass

    @app.command(cls=ConfiguredCommand)
    def serve(
        config: Annotated[Path | None, typer.Option(callback=use_config_file, is_eager=True)] = None,
        port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
        api_key: Annotated[list[str] | None, typer.Option(envvar="LEANSERVE_API_KEYS")] = None,
        prefix_cache: Annotated[bool, typer.Option("--prefix-cache/--no-prefix-cache")] = True,
        ranks: str = "auto",
    ) -> None:
        called.update(port=port, api_key=api_key, prefix_cache=prefix_cache, ranks=ranks)

    result = CliRunner().invoke(app, ["serve", *arguments], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return called, result.output


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "leanserve.yaml"
    path.write_text("port: 1\nranks: 3\nprefix-cache: false\napi_key: [first-key, second-key]\n")
    return path


def test_precedence(config: Path) -> None:
    assert run()[0] == {"port": 8000, "api_key": None, "prefix_cache": True, "ranks": "auto"}
    from_file, _ = run("--config", str(config))
    assert (from_file["port"], from_file["ranks"], from_file["prefix_cache"]) == (1, "3", False)
    assert list(from_file["api_key"]) == ["first-key", "second-key"]  # type: ignore[call-overload]
    from_environment, _ = run("--config", str(config), LEANSERVE_PORT="2", LEANSERVE_PREFIX_CACHE="true")
    assert (from_environment["port"], from_environment["prefix_cache"]) == (2, True)
    assert run("--config", str(config), "--port", "4", LEANSERVE_PORT="2")[0]["port"] == 4
    assert run(LEANSERVE_CONFIG=str(config))[0]["port"] == 1


@pytest.mark.parametrize(("variable", "model"), [("some/model", "some/model"), ("", None)])
def test_the_model_too_can_stand_in_the_environment(
    variable: str, model: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    monkeypatch.setenv("LEANSERVE_MODEL", variable)
    assert serve.make_context("serve", []).params["model"] == model
    assert serve.make_context("serve", ["given"]).params["model"] == "given"
    (tmp_path / "file.yaml").write_text("model: written\n")
    from_file = serve.make_context("serve", ["--config", str(tmp_path / "file.yaml")]).params["model"]
    assert from_file == (model or "written")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot: 1", "prot is no option; did you mean port"),
        ("colour: red", "allowed are api_key, port, prefix_cache, ranks"),
        ("port: [1]", "it must be one number, one word"),
        ("port: {a: 1}", "it must be one number, one word"),
        ("api_key: [[a]]", "a list of values"),
        ("- port", "holds list"),
        ("port: 'x", "cannot be read"),
        ("port: !!python/object/apply:os.system ['touch /tmp/owned']", "cannot be read"),
    ],
)
def test_a_wrong_file_says_what_is_allowed(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        run("--config", str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        run("--config", str(tmp_path / "missing.yaml"))


def test_a_wrong_value_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("port: 70000")
    for called, output in (run("--config", str(path)), run(LEANSERVE_PORT="70000"), run("--port", "70000")):
        assert not called
        assert "65535" in output


def test_a_variable_that_is_no_option_is_told() -> None:
    called, output = run(LEANSERVE_PROT="1", LEANSERVE_RUN_DIR="/run", LEANSERVE_PULSE_HOST="h")
    assert called["port"] == 8000
    assert "LEANSERVE_PROT is set" in output
    assert "did you mean LEANSERVE_PORT" in output
    assert "RUN_DIR" not in output
    assert "PULSE_HOST" not in output


def test_beyond_this_machine_only_with_keys_or_a_word(tmp_path: Path) -> None:
    launch = LaunchOptions()
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="--api-key-file"):
            ServeOptions(launch=launch, host=host)
        assert ServeOptions(launch=launch, host=host, insecure=True).server_settings().key_digests == ()
        access = AccessOptions(keys=("one-good-key,another-key two-good-keys",))
        assert len(ServeOptions(launch=launch, host=host, access=access).server_settings().key_digests) == 3
    assert is_loopback("127.3.2.1")
    assert is_loopback("::1")
    with pytest.raises(ConfigError, match="API key number 1"):
        ServeOptions(launch=launch, access=AccessOptions(keys=("short",))).server_settings()
