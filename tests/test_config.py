"""Every wrong recipe gets one line that names the field, the value and what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl import config, recipes, tables
from async_rl.errors import UserError

SORT = Path(__file__).resolve().parents[1] / "recipes" / "sort.toml"


def test_everywhere_is_an_address_where_generators_know_another() -> None:
    everywhere = ["weights.transport=http", "weights.host=0.0.0.0", "weights.relay_url=http://learner:8000"]
    assert recipes.load(SORT, everywhere).weights.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "staleness.max_stalenes=3",
            "staleness.max_stalenes = 3: there is no such field; did you mean 'staleness.max_st",
        ),
        ("zzz=1", "zzz = 1: there is no such field; known: steps, model"),
        ('steps="many"', "steps = 'many': expected int, got str"),
        ("steps=0", "steps = 0: write a number above 0"),
        ("optimizer.learning_rate=-1.0", "optimizer.learning_rate = -1.0: write 0 or more"),
        ("rollout.group_size=1.5", "rollout.group_size = 1.5: expected int, got float"),
        ("weights.relay_url=host:80", "weights.relay_url = 'host:80': write http://host:port"),
        ("weights.relay_port=70000", "weights.relay_port = 70000: write a port from 1 to 65534, or 0 for any free one"),
        ("weights.transport=carrier_pigeon", "weights.transport = 'carrier_pigeon': write auto, shared_"),
        (
            "weights.transport=shared-memory",
            "weights.transport = 'shared-memory': write auto, shared_memory, process_group",
        ),
        ("weights.transport=5", "weights.transport = 5: write auto, shared_memory, process_group or http"),
        ("report_to=['tensorbord']", "report_to[0] = 'tensorbord': write tensorboard, wandb or trackio; did you mean"),
        ("report_to=wandb", "report_to = 'wandb': expected array, got str; write ['wandb']"),
        ("optimizer.betas=[0.9, 'high']", "optimizer.betas[1] = 'high': expected float, got str"),
        ("staleness.depth=deep", "staleness.depth = 'deep': expected int | null, got str"),
        (
            "generator.sglang.environment={B='2', A=1}",
            "generator.sglang.environment.A = 1: expected str, got int; write it in quotes",
        ),
        ("generator.sglang.arguments=['--tp-size', 2]", "generator.sglang.arguments[1] = 2: expected str, got int"),
        ("learner.lora={rank='many'}", "learner.lora.rank = 'many': expected int, got str"),
        ("model.path=/nowhere", "model = 'path and tiny': set exactly one of path and tiny"),
        ("controller.port=70000", "controller.port = 70000: write a port from 1 to 65534, or 0 for any free one"),
        ("controller.host=0.0.0.0", "controller.host = '0.0.0.0': write the one address at which others reach it"),
        ("security={loopback=true, insecure=true}", "security.insecure = True: security.loopback = true asks for keys"),
        ("generator=5", "generator = 5: expected object, got int"),
        ("nonsense", "--set 'nonsense': write --set section.key=value"),
        ("steps.more=1", "--set 'steps.more=1': 'steps' is a value, not a section"),
        ("placement=together", "placement = 'together': write separate or colocated"),
        ("placement=seperate", "placement = 'seperate': write separate or colocated; did you mean 'separate'?"),
        ("environment.timeout_s=nan", "environment.timeout_s = nan: write a number above 0"),
        (
            "rollout.max_new_tokens=16384",
            "learner.microbatch_tokens = 16384: a rollout is trained whole: write more than rollout.max_new_tokens",
        ),
        (
            "optimizer={schedule='cosine', decay_steps=3}",
            "optimizer.decay_steps = 3: a cosine schedule decays all the time: write 0",
        ),
        (
            "generator={engine='sglang', sglang={attach=['http://10.0.0.5:30000', 'http://10.0.0.5:30000/']}}",
            "generator.sglang.attach = ['http://10.0.0.5:30000', 'http://10.0.0.5:30000/']: write different URLs",
        ),
        (
            "generator={engine='sglang', sglang={arguments=['--tp-size', '2', '--port=30000']}}",
            "generator.sglang.arguments = '--port=30000': a generator tells its server: leave it out",
        ),
        (
            "generator={engine='sglang', sglang={arguments=['--tp-size 2']}}",
            "generator.sglang.arguments = '--tp-size 2': write '--tp-size', '2'",
        ),
        (
            "generator={engine='sglang', sglang={attach=['http://10.0.0.5:b']}}",
            "generator.sglang.attach = 'http://10.0.0.5:b': write a URL, such as http://10.0.0.5:30000",
        ),
        (
            "generator={engine='sglang', sglang={host='0.0.0.0'}}",
            "generator.sglang.host = '0.0.0.0': write the address",
        ),
        ("weights={transport='process_group', host='0.0.0.0'}", "weights.host = '0.0.0.0': write the address at which"),
        ("weights.timeout_s=inf", "weights.timeout_s = inf: write a number above 0"),
        (
            "generator={engine='sglang', sglang={arguments=['--model-path', '/m']}}",
            "generator.sglang.arguments = '--model-path': a generator tells its server: write model.path",
        ),
        ("checkpoint.keep_best=1", "evaluation.every_steps = 0: checkpoint.keep_best needs an evaluation of every"),
    ],
)
def test_a_wrong_field_is_named(override: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        recipes.load(SORT, [override])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("weights.transport=process_group", "weights.transport = 'process_group': with placement = 'colocated' one"),
        ("generator.count=2", "generator.count = 2: with placement = 'colocated' one generator and one learner rank"),
        ("learner.ranks=2", "learner.ranks = 2: with placement = 'colocated' one generator and one learner rank"),
        ("learner.sharding=full", "learner.sharding = 'full': with placement = 'colocated' one generator and one"),
        ("learner.device=cuda:1", "generator.device = 'auto': with placement = 'colocated' one generator and one"),
    ],
)
def test_what_does_not_fit_on_one_device_is_named(override: str, says: str) -> None:
    assert recipes.load(SORT, ["placement=colocated"]).colocated and not recipes.load(SORT, [override]).colocated
    with pytest.raises(UserError) as caught:
        recipes.load(SORT, ["placement=colocated", override])
    assert str(caught.value).startswith(says) and str(caught.value).endswith(", or placement = 'separate'")


def test_a_missing_model_directory_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('steps = 1\n[model]\npath = "/nowhere"\n[environment]\nname = "sorting"\n')
    with pytest.raises(UserError, match=r"model.path = '/nowhere': write the path of a model directory"):
        recipes.load(recipe)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[environment]\nname = "sorting"\n')
    with pytest.raises(UserError, match="missing required field 'steps'"):
        recipes.load(recipe)


@pytest.mark.parametrize("text", ["steps = ", "= 3", "[a\n"])
def test_what_is_not_toml_is_named(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    with pytest.raises(UserError, match="is not TOML"):
        recipes.load(recipe)
    with pytest.raises(UserError, match="No such file"):
        recipes.load(tmp_path / "missing.toml")


def test_a_recipe_survives_being_written_down() -> None:
    run = recipes.load(SORT, ["seed=7", "report_to=['tensorboard']"])
    assert recipes.from_table(json.loads(tables.dumps(run))) == run
    assert tables.differences(run, recipes.load(SORT, ["seed=8"])) == [
        "report_to: ['tensorboard'] -> []",
        "seed: 7 -> 8",
    ]


def test_a_module_path_is_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    recipe = tmp_path / "r.toml"
    recipe.write_text(SORT.read_text().replace('name = "sorting"', 'name = "mine"\nmodule = "mine.py"'))
    assert recipes.load(recipe).environment.module == str(tmp_path / "mine.py")


@given(st.integers(0, 9), st.one_of(st.none(), st.integers(0, 9)))
def test_depth_never_exceeds_eta(eta: int, depth: int | None) -> None:
    assert config.Staleness(max_staleness=eta, depth=depth).steps_ahead <= eta
