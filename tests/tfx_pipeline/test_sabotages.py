"""The checks that guard a release catch what they are there for, and pass a sound run."""

from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.tfx_pipeline.sabotages import SABOTAGES, Checks, Soundness
from tests.tfx_pipeline.taste_run import Run
from tfx_pipeline.config import RANKING, RETRIEVAL, RunPaths
from tfx_pipeline.outcome import read_artifact_uris
from tfx_pipeline.recommend import serving_folder

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def sound(fresh: Run, paths: RunPaths) -> Soundness:
    """The pushed models: other tests train worse ones in the same folder, which are not pushed."""
    result = fresh.result
    return Soundness(
        result.config,
        Path(result.tables_dir),
        {key: Path(uri) for key, uri in read_artifact_uris(paths.metadata).items()},
        {model: serving_folder(result, paths, model) for model in (RETRIEVAL, RANKING)},
    )


@pytest.fixture
def checks(sound: Soundness, monkeypatch: pytest.MonkeyPatch) -> Checks:
    return Checks(sound, monkeypatch)


def test_a_sound_run_passes_every_check(checks: Checks) -> None:
    sound = checks.sound
    tables = sound.tables
    assert [
        *checks.interactions("train", lambda rows: rows),
        *checks.states(sound.user_states, sound.catalogue),
        *checks.splits({split: found.keys for split, found in sound.samples.items()}),
        *checks.transform(tables.interactions, tables.users),
        *checks.retrieval(sound.lists),
        *checks.ranking(sound.predictions),
        *checks.data(sound.statistics("train"), sound.statistics("eval")),
        *(failed for model in (RETRIEVAL, RANKING) for failed in checks.golden(model, sound.answer(model))),
    ] == []


@pytest.mark.parametrize("name", SABOTAGES)
def test_a_sabotage_is_caught_by_the_check_that_is_there_for_it(checks: Checks, name: str) -> None:
    assert documented()[name] in SABOTAGES[name](checks)


def test_the_documentation_lists_every_sabotage() -> None:
    assert list(documented()) == list(SABOTAGES)
    assert len(SABOTAGES) >= 20


def documented() -> dict[str, str]:
    """Sabotage to the check that catches it, as docs/sabotages.md has them."""
    lines = (REPO / "docs" / "sabotages.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return dict(rows[2:])  # type: ignore[arg-type]
