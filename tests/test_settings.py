"""Where a setting's value comes from, what is refused, and that configs/default.toml says the defaults."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from maskserve.errors import SettingsError
from maskserve.settings import BY_NAME, ROWS, default_toml, load, size

ROOT = Path(__file__).parent.parent


def test_flags_beat_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "maskserve.toml"
    file.write_text('serve_port = 1\nserve_host = "file"\nthreads = 1\n')
    environment = {"MASKSERVE_SERVE_PORT": "2", "MASKSERVE_SERVE_HOST": "variable"}
    settings = load({"serve_port": "3", "serve_host": None}, str(file), environment)
    assert [settings[name] for name in ("serve_port", "serve_host", "threads", "device")] == [3, "variable", 1, "auto"]
    assert [settings.rows[name].source for name in ("serve_port", "serve_host", "threads", "device")] == [
        "--port", "MASKSERVE_SERVE_HOST", f"{file}: threads", "default",
    ]  # fmt: skip


def test_the_file_that_the_flag_names_beats_the_one_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("threads = 1")
    (tmp_path / "b.toml").write_text("threads = 2")
    environment = {"MASKSERVE_CONFIG": str(tmp_path / "a.toml")}
    assert load(None, None, environment)["threads"] == 1
    assert load(None, str(tmp_path / "b.toml"), environment)["threads"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("serve_prot = 1", "{file}: 'serve_prot' is not a setting; did you mean serve_port?"),
        ("serve_port = 'x'", "{file}: serve_port is 'x'; it must be a port, 0 to 65535"),
        ("threads = -1", "{file}: threads is -1; it must be a whole number, 0 or more"),
        ("threads = true", "{file}: threads is True; it must be a whole number, 0 or more"),
        ("serve_grace = 'inf'", "{file}: serve_grace is 'inf'; it must be a number of seconds, 0 or more"),
        ("serve_header_timeout = 0", "{file}: serve_header_timeout is 0; it must be a number of seconds above 0"),
        ("serve_allow_anonymous = 'yes'", "{file}: serve_allow_anonymous is 'yes'; it must be true or false"),
        ("serve_allowed_host = ['a:80']", "{file}: serve_allowed_host is ['a:80']; it must be names of hosts without"),
        ("serve_allowed_host = 1", "{file}: serve_allowed_host is 1; it must be names of hosts without ports"),
        ("serve_max_body = '1 XB'", "{file}: serve_max_body is '1 XB'; it must be a size in bytes"),
        ("= 1", "{file} is not TOML"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load(None, str(file), {})
    assert caught.value.message.startswith(message.format(file=file))


def test_a_file_that_is_not_there_is_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        load(None, str(tmp_path / "none.toml"), {})


def test_a_variable_that_sets_nothing_is_named_unless_kubernetes_set_it() -> None:
    environment = {
        "MASKSERVE_DEVCIE": "cpu", "MASKSERVE_PORT": "tcp://10.0.0.1:8000", "MASKSERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "MASKSERVE_SERVICE_HOST": "10.0.0.1", "MASKSERVE_SERVICE_PORT_HTTP": "8000", "MASKSERVE_DEBUG": "1",
        "PATH": "/",
    }  # fmt: skip
    settings = load(None, None, environment)
    assert settings.unknown == ("MASKSERVE_DEVCIE is not a setting; did you mean MASKSERVE_DEVICE?",)
    assert settings["serve_port"] == 8000


@pytest.mark.parametrize(
    ("text", "n"), [("1MB", 10**6), ("1MiB", 2**20), ("0.5 KiB", 512), ("7", 7), ("7B", 7), (9, 9), ("2GB", 2 * 10**9)]
)
def test_sizes_are_decimal_or_binary_as_their_unit_says(text: object, n: int) -> None:
    assert size(text) == n


@pytest.mark.parametrize("text", ["", "MB", "-1", "1.2.3", "1mb", "1 M B", True, "inf", "1e6"])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="a size in bytes"):
        size(text)


@pytest.mark.parametrize("given", ["A.example, [::1],", ["a.example", "[::1]"], ("A.EXAMPLE", " [::1] ")])
def test_a_list_comes_from_toml_from_flags_or_between_commas(given: object) -> None:
    settings = load({"serve_allowed_host": given}, None, {"MASKSERVE_SERVE_ALLOWED_HOST": "b.example"})
    assert settings["serve_allowed_host"] == ("a.example", "[::1]")
    assert str(settings.rows["serve_allowed_host"]) == "a.example,[::1]"


@pytest.mark.parametrize(("given", "value"), [("1", True), ("TRUE", True), (True, True), ("0", False), (False, False)])
def test_a_switch_is_true_or_false(given: object, value: bool) -> None:
    assert load({"serve_allow_anonymous": given}, None, {})["serve_allow_anonymous"] is value


def test_every_default_passes_its_own_check_and_default_toml_sets_them_all() -> None:
    said = tomllib.loads(default_toml())
    assert said == {row.name: list(row.default) if isinstance(row.default, tuple) else row.default for row in ROWS}
    assert [load(None, None, {})[row.name] for row in ROWS] == [row.parse(row.default) for row in ROWS]


def test_configs_default_toml_is_the_generated_one() -> None:
    assert (ROOT / "configs/default.toml").read_text() == default_toml(), (
        "run python -m maskserve.settings > configs/default.toml"
    )


def test_something_uses_every_setting() -> None:
    sources = [p for folder in ("maskserve", "cli", "api") for p in (ROOT / folder).rglob("*.py")]
    words = {
        node.value
        for path in sources
        if path.name != "settings.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(BY_NAME) <= words, "a setting that nothing reads"
