"""Curation from shards to shards: what it counts, keeps, copies and refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mmpt.config import UserError, load_recipe
from mmpt.data.curate import CurateRecipe, curate_shards
from mmpt.data.curate.filters import check_filters
from mmpt.data.shards import (
    Quarantine,
    Record,
    is_heldout,
    read_documents,
    read_samples,
    write_shard,
)
from mmpt.parts import Audio, Image
from mmpt.sound import sound_bytes

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def page(key: str, text: str, *media: dict, base: str = "") -> Record:
    parts = ({"type": "text", "text": text}, *media)
    return Record(key, base or key, "any", parts, source="test", license="")


def prose(seed: int, count: int = 60) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"{rng.choice(WORDS)}{rng.integers(99)}" for _ in range(count))


def curated(shards: list[Path], out: Path, **options) -> dict:
    recipe = CurateRecipe(shards=tuple(map(str, shards)), **options)
    return curate_shards(recipe, out).to_json()


def keys(folder: Path) -> list[str]:
    return [each.key for each in read_documents(sorted(folder.glob("*.tar")), Quarantine())]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two shards: a long page, an exact and a near copy of it, another page, short ones."""
    long = prose(0)
    near = long.rsplit(" ", 1)[0] + " changed"
    first, second = tmp_path / "raw" / "a-0.tar", tmp_path / "raw" / "b-0.tar"
    write_shard(first, [page("a1", long), page("a2", "Hi!"), page("a3", prose(1))])
    write_shard(second, [page("b1", f"  {long.upper()}."), page("b2", near), page("b3", "hi")])
    return [first, second]


def test_used_filtered_and_quarantined_are_what_was_read(shards, tmp_path):
    data = bytearray(shards[0].read_bytes())
    bad = data.index(b"Hi!")
    data[bad : bad + 1] = b"\xff"
    shards[0].write_bytes(data)
    out = tmp_path / "out"
    found = curated(shards, out, filters={"short": "text_chars < 20", "copy": "near_copy > 0"})
    assert found["read"] == 6
    assert (found["used"], found["filtered"], found["quarantined"]) == (2, 3, 1)
    assert found["filters"] == {"copy": 2, "short": 1}
    assert keys(out) == ["a1", "a3"]
    assert [(line["key"], line["filter"]) for line in lines(out / "filtered.jsonl")] == [
        ("b1", "copy"),
        ("b2", "copy"),
        ("b3", "short"),
    ]
    [problem] = lines(out / "quarantine.jsonl")
    assert problem["key"] == "a2"
    assert json.loads((out / "report.json").read_text()) == found


def test_what_is_used_is_copied_byte_by_byte(shards, tmp_path):
    curated(shards, tmp_path / "out", filters={"short": "text_chars < 20"})
    before = {s.key: s.members for s in read_samples(shards[1])}  # type: ignore[union-attr]
    after = {s.key: s.members for s in read_samples(tmp_path / "out" / "b-0.tar")}  # type: ignore[union-attr]
    assert after == {key: before[key] for key in ("b1", "b2")}


def test_the_first_filter_that_is_true_is_why(shards, tmp_path):
    filters = {"short": "text_chars < 20", "tiny": "text_chars < 3"}
    found = curated(shards, tmp_path / "out", filters=filters)
    assert found["filters"] == {"short": 2}
    assert found["matches"] == {"short": 2, "tiny": 1}
    assert lines(tmp_path / "out" / "filtered.jsonl")[1]["also"] == ["tiny"]


def test_other_thresholds_annotate_nothing_again_and_changed_shards_do(shards, tmp_path):
    out = tmp_path / "out"
    assert curated(shards, out)["annotations_kept"] == 0
    times = {path: path.stat().st_mtime_ns for path in (out / "annotations").iterdir()}
    again = curated(shards, out, filters={"all": "true"})
    assert again["annotations_kept"] == 2
    assert again["shards"] == []
    assert not list(out.glob("*.tar"))  # those of the first run are gone
    assert {path: path.stat().st_mtime_ns for path in times} == times
    write_shard(shards[0], [page("new", prose(3))])
    assert curated(shards, out)["annotations_kept"] == 1
    assert keys(out) == ["new", "b1", "b2", "b3"]


def test_results_do_not_depend_on_the_run(shards, tmp_path):
    filters = {"copy": "near_copy > 0", "some": "draw < 0.5"}
    for name in ("x", "y"):
        curated(shards, tmp_path / name, filters=filters)
    for name in ("filtered.jsonl", "a-0.tar", "annotations/a-0.parquet"):
        one, other = tmp_path / "x" / name, tmp_path / "y" / name
        assert one.exists() == other.exists()
        assert not one.exists() or one.read_bytes() == other.read_bytes()


def test_the_draw_is_that_of_seed_and_key(tmp_path):
    shard = tmp_path / "many.tar"
    write_shard(shard, [page(f"k{i}", f"text {i}") for i in range(200)])
    kept = {}
    for seed in (0, 1):
        found = curated([shard], tmp_path / "out", filters={"half": "draw < 0.5"}, seed=seed)
        assert 70 <= found["used"] <= 130
        kept[seed] = set(keys(tmp_path / "out"))
    assert kept[0] != kept[1]


def test_a_copy_of_a_held_out_document_leaves_training_never_the_other_way(tmp_path):
    text, shard = prose(0), tmp_path / "mixed.tar"
    bases = [f"base{i}" for i in range(50)]
    held = next(base for base in bases if is_heldout(base))
    free = next(base for base in bases if not is_heldout(base))
    write_shard(shard, [page("train", text, base=free), page("held", text, base=held)])
    curated([shard], tmp_path / "out", filters={"copy": "text_copy > 0"})
    assert keys(tmp_path / "out") == ["held"]


def test_pictures_that_were_shown_before(tmp_path):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (8, 8, 3), np.uint8)
    picture = Image(np.kron(small, np.ones((8, 8, 1), np.uint8)))
    other = Image(np.kron(rng.integers(0, 255, (8, 8, 3), np.uint8), np.ones((4, 8, 1), np.uint8)))
    dimmed = Image((picture.pixels * 0.9).astype(np.uint8))
    documents = []
    for key, image in {"one": picture, "same": dimmed, "other": other}.items():
        image.save(tmp_path / f"{key}.png")
        data = (tmp_path / f"{key}.png").read_bytes()
        part = {"type": "image", "suffix": "png", "data": data}
        documents.append(page(key, key, part, base="one"))
    write_shard(tmp_path / "p.tar", documents)
    out = tmp_path / "out"
    curated([tmp_path / "p.tar"], out, filters={"seen": "pictures_seen = pictures"})
    assert keys(out) == ["one", "other"]
    curated([tmp_path / "p.tar"], out, filters={"narrow": "picture_aspect > 1.5"})
    assert keys(out) == ["one", "same"]


def test_sounds_without_a_voice(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.01, 16_000).astype(np.float32)
    noise[:160] = 1.0
    data = sound_bytes(Audio(noise, 16_000).wave, 16_000, ".flac")
    sound = {"type": "audio", "suffix": "flac", "data": data}
    write_shard(tmp_path / "s.tar", [page("noise", "ten chars.", sound)])
    curated([tmp_path / "s.tar"], tmp_path / "out")
    [row] = pq.read_table(tmp_path / "out" / "annotations" / "s.parquet").to_pylist()
    assert row["voice"] < 0.1
    assert row["clipped"] == pytest.approx(0.01)
    assert row["chars_per_second"] == pytest.approx(10)


def test_evaluation_texts_are_found_in_files_and_shards(shards, tmp_path):
    words = prose(1).split()
    (tmp_path / "exam.txt").write_text("\n".join([*words[20:30], " ".join(words[30:40]), "hi"]))
    sets = {"exam": (str(tmp_path / "exam.txt"),), "pages": (str(shards[1]),)}
    filters = {"exam": "evaluation = 'exam'", "pages": "evaluation_share > 0.5"}
    found = curated([shards[0]], tmp_path / "out", evaluations=sets, filters=filters)
    assert found["filters"] == {"exam": 2, "pages": 1}
    [row] = [r for r in annotations(tmp_path / "out", "a-0") if r["key"] == "a3"]
    assert row["evaluation_share"] == pytest.approx(8 / 48)  # runs of 13 in 20 of its 60 words


def annotations(out: Path, name: str) -> list[dict]:
    return pq.read_table(out / "annotations" / f"{name}.parquet").to_pylist()


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("text_chars <", "syntax error"),
        ("no_such_thing < 2", "Columns are shard, number"),
        ("text_char < 2", "Did you mean text_chars?"),
        ("text_chars", "condition"),
        ("count(*) > 1", "filters.it"),
        ("true) from documents; copy documents to 'x.csv' --", "syntax error"),
        ("text_chars > (select count(*) from read_csv('pyproject.toml'))", "disabled"),
        ("text_chars > (select count(*) from glob('*'))", "disabled"),
        ("exists (select 1 from recipe)", "recipe"),
        ("", "filters.it"),
    ],
)
def test_expressions_that_are_refused_before_anything_is_read(expression, says, shards, tmp_path):
    with pytest.raises(UserError, match=r"^filters\.it = .*") as error:
        curated(shards, tmp_path / "out", filters={"it": expression})
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_expression_that_fails_on_a_value(shards, tmp_path):
    with pytest.raises(UserError, match="cannot be evaluated"):
        curated(shards, tmp_path / "out", filters={"it": "cast(excerpt as integer) > 1"})


def test_mistakes_in_a_recipe(shards, tmp_path):
    copy = shutil.copy(shards[0], tmp_path / "a-0.tar")
    for given, says in [
        ({"shards": [*shards, copy]}, "one name"),
        ({"shards": shards, "near_similarity": 0.2}, "near_similarity"),
        ({"shards": shards, "picture_bits": 40}, "picture_bits"),
        ({"shards": shards, "evaluations": {"e": (str(tmp_path / "none.txt"),)}}, "none.txt"),
    ]:
        with pytest.raises(UserError, match=says):
            curated(**given, out=tmp_path / "out")
    with pytest.raises(UserError, match=r"holds .* itself"):
        curated(shards, shards[0].parent)


def test_a_missing_package_names_the_extra(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("mmpt.data.curate.PACKAGES", ("duckdb", "no_such_package"))
    with pytest.raises(UserError, match=r"no_such_package.*mmpt\[curate\]"):
        curated(shards, tmp_path / "out")


def test_processes_write_what_one_does(shards, tmp_path):
    recipe = CurateRecipe(shards=tuple(map(str, shards)))
    for workers in (1, 2):
        curate_shards(recipe, tmp_path / str(workers), workers=workers)
    for name in ("a-0.parquet", "b-0.parquet", "compared.parquet"):
        one, two = (tmp_path / folder / "annotations" / name for folder in "12")
        assert one.read_bytes() == two.read_bytes()


def test_a_sound_shorter_than_what_the_voice_detector_looks_at(tmp_path):
    data = sound_bytes(np.full(10, 0.1, np.float32), 44_100, ".flac")
    sound = {"type": "audio", "suffix": "flac", "data": data}
    write_shard(tmp_path / "s.tar", [page("click", "click", sound)])
    assert curated([tmp_path / "s.tar"], tmp_path / "out")["used"] == 1


def test_a_dry_run_writes_no_shards(shards, tmp_path):
    recipe = CurateRecipe(shards=tuple(map(str, shards)), filters={"short": "text_chars < 20"})
    found = curate_shards(recipe, tmp_path / "out", dry_run=True)
    assert (found.used, found.filtered.total()) == (4, 2)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_the_example_recipe_is_one():
    recipe = load_recipe(CurateRecipe, "examples/recipes/curate.toml")
    check_filters(recipe.filters)
