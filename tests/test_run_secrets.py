"""Keys and token of a run: made once, for nobody else's eyes."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from async_rl import cli
from async_rl.errors import UserError
from async_rl.run_secrets import RunSecrets


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_the_owner_reads_them(tmp_path: Path) -> None:
    secrets = RunSecrets(tmp_path / "secrets")
    keys = secrets.make()
    assert mode(secrets.directory) == 0o700
    names = {path.name: mode(path) for path in secrets.directory.iterdir()}
    assert names == dict.fromkeys(["controller.key", "generator.key", "learner.key", "token"], 0o600)
    generator, learner = secrets.client("generator"), secrets.client("learner")
    assert generator.controller == learner.controller == keys.public
    assert keys.allowed == {"generator": generator.public, "learner": learner.public}
    assert len({keys.secret, generator.secret, learner.secret}) == 3
    for one in (keys, generator, learner):
        assert one.secret not in repr(one) + str(one) + f"{[one]}"


def test_whoever_comes_second_uses_what_is_there(tmp_path: Path) -> None:
    """Also at the same moment, and nothing half-made is left."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: RunSecrets(tmp_path / "secrets").make(), range(16)))
    assert all(keys == made[0] for keys in made)
    assert [path.name for path in tmp_path.iterdir()] == ["secrets"]
    assert RunSecrets(tmp_path / "secrets").token() == RunSecrets(tmp_path / "secrets").token()


def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path) -> None:
    secrets = RunSecrets(tmp_path / "secrets")
    key = secrets.directory / "generator.key"

    def says() -> str:
        with pytest.raises(UserError) as caught:
            secrets.client("generator")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert says().startswith(f"{key}: no such file; the controller makes it when it starts")
    secrets.make()
    content = key.read_bytes()
    for others in (0o640, 0o604, 0o777):
        key.chmod(others)
        assert says().startswith(f"{key}: others may read it (mode {others:04o}): chmod 600 {key}")
    key.chmod(0o400)
    secrets.client("generator")
    key.chmod(0o600)
    for damaged in (
        b"",
        content[:60],
        b"[]",
        content.replace(b'"secret"', b'"sekret"'),
        content.replace(b'":"', b'":"#'),
    ):
        key.write_bytes(damaged)
        assert says().startswith(f"{key}: this is no key of a run (")
    keys = secrets.directory / "controller.key"
    keys.write_bytes(keys.read_bytes().replace(b'"learner"', b'"lerner"'))
    with pytest.raises(UserError, match=f"{keys}: this is no key of a run"):
        secrets.server()
    with pytest.raises(UserError, match="nowhere/secrets: cannot be made \\(No such file"):
        RunSecrets(tmp_path / "nowhere" / "secrets").make()
    secrets.token_file.write_text("short")
    with pytest.raises(UserError, match="token: this is no token"):
        secrets.token()


@pytest.mark.parametrize("role", ["generator", "learner"])
def test_a_service_without_its_key_says_so_before_it_loads_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str
) -> None:
    recipe = tmp_path / "far.toml"
    recipe.write_text(
        "steps = 1\nmodel.tiny.characters = '0123456789'\nenvironment.name = 'sorting'\ncontroller.host = '192.0.2.7'\n"
    )
    arguments = ["--config", str(recipe), "--run-dir", str(tmp_path / "run"), "--connect", "tcp://192.0.2.7:5555"]
    for more, folder in ([], tmp_path / "run" / "secrets"), (["--secrets", str(tmp_path)], tmp_path):
        with pytest.raises(SystemExit) as left:
            cli.main(["serve", role, *arguments, *more])
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith(f"async-rl: {folder}/{role}.key: no such file; the controller makes")
