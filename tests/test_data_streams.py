"""Data that the `datasets` library streams. Nothing is fetched: the hub is a folder, or a loader put in its place."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bnctl.data.folder import read_folder
from bnctl.data.open import open_data
from bnctl.data.preprocess import Preprocess
from bnctl.errors import DataError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((10, 3, 2, 4)).astype(np.float32)
PIXELS = RNG.integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(10) % 3
INPUT = PIXELS.transpose(0, 3, 1, 2).astype(np.float32) * np.float32(1 / 255)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def encoded(image, kind="PNG"):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind)
    return file.getvalue()


def cells(images):
    return [{"bytes": encoded(image), "path": None} for image in images]


def write_images(name="images.parquet", images=PIXELS, labels=LABELS):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ape", "bee", "cat"]), "text": TEXT}
    columns = {"image": cells(images), "label": labels[: len(images)].tolist(), "text": ["?"] * len(images)}
    table = pa.table(columns, schema=datasets.Features(features).arrow_schema)
    pq.write_table(table, name)


TEXT = datasets.Value("string")


def write_tar(name, samples):
    """Each sample: a name, and contents by ending."""
    with tarfile.open(name, "w") as tar:
        for sample, parts in samples.items():
            for ending, content in parts.items():
                info = tarfile.TarInfo(f"{sample}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_shards():
    for shard in range(2):
        numbers = range(shard * 5, shard * 5 + 5)
        write_tar(
            f"{shard:02}.tar",
            {
                f"{i:05}": {"png": encoded(PIXELS[i]), "cls": b"%d" % LABELS[i], "json": json.dumps({"n": i}).encode()}
                for i in numbers
            },
        )


def joined(batches):
    read = list(batches)
    labels = None if read[0].labels is None else np.concatenate([b.labels for b in read])
    return np.concatenate([b.args[0] for b in read]), labels


class TestImages:
    @pytest.mark.parametrize("word", ["images.parquet", "*.tar", "hf:local", "hf:local:train"])
    @pytest.mark.parametrize("workers", [0, 2])
    def test_they_are_read_as_those_of_a_folder(self, place, word, workers):
        write_shards()
        write_images()
        (place / "local").mkdir()
        write_images("local/train.parquet")
        write_images("local/test.parquet", PIXELS[:2])
        batches = open_data(word, batch_size=4, workers=workers)
        for _ in range(2):
            read = list(batches.every())
            assert [(i, b.start, b.size) for i, b in read] == [(0, 0, 4), (1, 4, 4), (2, 8, 2)]
            images, labels = joined(b for _, b in read)
            np.testing.assert_array_equal(images, INPUT)
            assert images.dtype == np.float32
            np.testing.assert_array_equal(labels, LABELS)
        share = dict(batches.every(1, 2))
        assert list(share) == [1]
        np.testing.assert_array_equal(share[1].args[0], INPUT[4:8])

    def test_a_split_of_the_hub(self, place):
        (place / "local").mkdir()
        write_images("local/train.parquet")
        write_images("local/test.parquet", PIXELS[:2])
        np.testing.assert_array_equal(joined(open_data("hf:local:test"))[0], INPUT[:2])

    def test_images_beside_the_table(self, place):
        """What the library makes of a folder of images: paths without bytes."""
        for i, name in enumerate(("bee", "ape")):
            (place / "pictures" / "train" / name).mkdir(parents=True)
            Image.fromarray(PIXELS[i]).save(place / "pictures" / "train" / name / "1.png")
        got, labels = joined(open_data("hf:pictures"))
        want, wanted = joined(read_folder(place / "pictures" / "train"))
        np.testing.assert_array_equal(got[np.argsort(labels)], want[np.argsort(wanted)])
        assert sorted(labels) == [0, 1]

    def test_preprocess_and_modes(self):
        steps = Preprocess(resize=4, crop=3, mean=0.5, std=0.25, channels="BGR")
        forms = [Image.fromarray(PIXELS[i]).convert(mode) for i, mode in enumerate(("RGB", "L", "P", "RGBA"))]
        write_images(images=forms)
        got, _ = joined(open_data("images.parquet", preprocess=steps))
        want = steps.batch([steps.pixels(image, "") for image in forms], [""] * 4)
        np.testing.assert_array_equal(got, want)

    def test_two_images_per_sample_are_inputs_by_name(self):
        write_tar("two.tar", {f"{i}": {"a.png": encoded(PIXELS[i]), "b.png": encoded(PIXELS[-i])} for i in range(1, 4)})
        (batch,) = open_data("two.tar")
        assert batch.args == ()
        np.testing.assert_array_equal(batch.kwargs["a.png"], INPUT[1:4])
        np.testing.assert_array_equal(batch.kwargs["b.png"], INPUT[[-1, -2, -3]])

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"text", r"sample 5 \(00005\.png\) is not an image"),
            (encoded(PIXELS[0])[:60], r"sample 5 \(00005\.png\) is not an image that can be read"),
            (encoded(PIXELS[0, :2]), r"sample 5 \(00005\.png\) is 2x5 where .*sample 4 \(00004\.png\) is 6x5"),
        ],
    )
    def test_an_image_that_does_not_fit_is_named(self, workers, content, message):
        samples = {f"{i:05}": {"png": content if i == 5 else encoded(PIXELS[i]), "cls": b"1"} for i in range(7)}
        write_tar("data.tar", samples)
        passing = iter(open_data("data.tar", batch_size=4, workers=workers))
        next(passing)
        with pytest.raises(DataError, match=message) as caught:
            next(passing)
        assert caught.value.message.startswith("data.tar")
        assert "0x" not in caught.value.message  # the address of an object says nothing
        assert caught.value.hint

    def test_an_image_that_is_not_there(self):
        schema = datasets.Features({"image": datasets.Image()}).arrow_schema
        pq.write_table(pa.table({"image": [*cells(PIXELS[:2]), None]}, schema=schema), "holes.parquet")
        with pytest.raises(DataError, match=r"holes\.parquet, sample 2: image is empty"):
            list(open_data("holes.parquet"))


class TestArrays:
    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int8", "bool"])
    @pytest.mark.parametrize("form", ["lists", "fixed", "array"])
    def test_values_and_types_are_kept(self, dtype, form):
        x = (X * 3).astype(dtype)
        features = {
            "lists": datasets.List(datasets.List(datasets.List(datasets.Value(dtype)))),
            "fixed": datasets.List(datasets.List(datasets.List(datasets.Value(dtype), length=4), length=2), length=3),
            "array": datasets.Array3D((3, 2, 4), dtype),
        }
        made = datasets.Features({"x": features[form], "y": datasets.Value("int32")})
        table = datasets.Dataset.from_dict({"x": list(x), "y": LABELS}, features=made).data.table
        pq.write_table(table, "d.parquet")
        batches = open_data("d.parquet", batch_size=4)
        got, labels = joined(batches)
        assert got.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(got, x)
        np.testing.assert_array_equal(labels, LABELS)
        np.testing.assert_array_equal(joined(open_data("d.parquet", batch_size=3, limit=5))[0], x[:5])

    def test_other_columns(self):
        pq.write_table(
            pa.table({"t": [[1, 2], [3, 4]], "mask": [[True, False]] * 2, "s": ["a", "b"], "cls": [1, 0]}), "d.parquet"
        )
        (batch,) = open_data("d.parquet")
        assert batch.args == ()
        np.testing.assert_array_equal(batch.kwargs["t"], [[1, 2], [3, 4]])
        assert batch.kwargs["mask"].dtype == np.bool_
        assert batch.kwargs.keys() == {"t", "mask"}
        np.testing.assert_array_equal(batch.labels, [1, 0])
        pq.write_table(pa.table({"only": [1.5, 2.5], "s": ["a", "b"]}), "d.parquet")
        (batch,) = open_data("d.parquet")
        np.testing.assert_array_equal(batch.args[0], [1.5, 2.5])
        assert batch.labels is None

    def test_arrays_of_webdataset(self):
        def stored(array):
            file = io.BytesIO()
            np.save(file, array)
            return file.getvalue()

        write_tar("a.tar", {f"{i}": {"npy": stored(X[i]), "cls": b"2"} for i in range(10)})
        got, labels = joined(open_data("a.tar", batch_size=3))
        np.testing.assert_array_equal(got, X)
        assert got.dtype == np.float32
        assert set(labels) == {2}

    def test_arrays_of_pixels_need_preprocess_and_nothing_else_takes_it(self):
        features = datasets.Features({"x": datasets.Array3D((6, 5, 3), "uint8")})
        pq.write_table(datasets.Dataset.from_dict({"x": list(PIXELS)}, features=features).data.table, "d.parquet")
        with pytest.raises(DataError, match=r"d\.parquet: x holds uint8 images") as caught:
            list(open_data("d.parquet"))
        assert "--preprocess" in caught.value.hint
        np.testing.assert_array_equal(joined(open_data("d.parquet", batch_size=4, preprocess=Preprocess()))[0], INPUT)
        with pytest.raises(DataError, match="image 4 is 6x5, smaller than the crop"):
            for _, batch in open_data("d.parquet", batch_size=4, preprocess=Preprocess(crop=9)).every(1, 2):
                raise AssertionError(batch)
        pq.write_table(pa.table({"x": X.reshape(10, -1).tolist()}), "d.parquet")
        with pytest.raises(DataError, match="holds no images to preprocess"):
            list(open_data("d.parquet", preprocess=Preprocess()))


class TestErrors:
    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"s": ["a"], "y": [1]}, r"no images and no numbers, only s \(string\), y \(int64\)"),
            ({"x": [1.0], "label": [1], "cls": [2]}, "labels in label and cls"),
            ({"x": [[1.0], [1.0, 2.0]]}, "x: the lists differ in length"),
            ({"x": [[1.0], None]}, "x: 1 values are missing"),
            ({"x": [[1.0], [None]]}, "x: 1 values are missing"),
            ({"x": [1.0, None]}, "x: 1 values are missing"),
            ({"x": [1.0], "y": ["cat"]}, "y holds no class numbers but string"),
            ({"x": [1.0], "y": [0.5]}, "y holds no class numbers but double"),
            ({"x": [1.0, 2.0], "y": [1, None]}, "y holds no class numbers"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, columns, message):
        pq.write_table(pa.table(columns), "d.parquet")
        with pytest.raises(DataError, match=message) as caught:
            list(open_data("d.parquet"))
        assert caught.value.message.startswith("d.parquet")
        assert caught.value.hint

    def test_several_columns_of_classes(self):
        features = datasets.Features({"x": datasets.Value("float32"), "a": CLASS, "b": CLASS})
        pq.write_table(pa.table({"x": [1.0], "a": [0], "b": [1]}, schema=features.arrow_schema), "d.parquet")
        with pytest.raises(DataError, match="labels in a and b"):
            open_data("d.parquet")

    def test_damaged_files(self, place, capfd):
        write_images()
        write_shards()
        whole, shard = (place / "images.parquet").read_bytes(), (place / "00.tar").read_bytes()
        for name, content in [
            ("d.parquet", b""),
            ("d.parquet", b"text"),
            ("d.parquet", whole[:-50]),
            ("d.parquet", whole[:300] + bytes(300) + whole[600:]),
            ("d.tar", b""),
            ("d.tar", b"text"),
            ("d.tar", shard[:700]),
        ]:
            (place / name).write_bytes(content)
            with pytest.raises(DataError, match=rf"d\.{name[2:]}") as caught:
                list(open_data(name))
            assert caught.value.hint
        assert capfd.readouterr() == ("", "")

    def test_without_the_library(self, monkeypatch):
        write_images()
        write_shards()
        for name, word in (("pyarrow", "images.parquet"), ("datasets", "hf:some/name"), ("datasets", "00.tar")):
            monkeypatch.setitem(sys.modules, name, None)
            with pytest.raises(DataError, match=f"{word}: the library {name} is missing") as caught:
                open_data(word)
            assert caught.value.hint == "pip install 'bnctl[data]'"


CLASS = datasets.ClassLabel(names=["p", "q"])


class TestParquetFiles:
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=3),
        st.integers(1, 9),
        st.none() | st.integers(1, 20),
        st.integers(1, 3),
    )
    def test_files_and_row_groups_do_not_show(self, place, files, batch_size, limit, step):
        for old in place.glob("*.parquet"):
            old.unlink()
        start = 0
        for number, (samples, group) in enumerate(files):
            numbers = list(range(start, start + samples))
            pq.write_table(pa.table({"x": numbers, "y": numbers}), f"{number}.parquet", row_group_size=group)
            start += samples
        batches = open_data(place / "*.parquet", batch_size=batch_size, limit=limit)
        want = np.arange(start)[:limit]
        read = [batch for first in range(step) for batch in batches.every(first, step)]
        read.sort(key=lambda pair: pair[0])
        assert [i for i, _ in read] == list(range(len(batches)))
        assert all(b.start == i * batch_size == b.args[0][0] for i, b in read)
        np.testing.assert_array_equal(np.concatenate([b.args[0] for _, b in read]), want)
        np.testing.assert_array_equal(np.concatenate([b.labels for _, b in read]), want)

    def test_a_share_reads_no_row_group_of_another(self, monkeypatch):
        pq.write_table(pa.table({"x": list(range(20))}), "d.parquet", row_group_size=4)
        batches = open_data("d.parquet", batch_size=4)
        read = []
        load = pq.ParquetFile.read_row_group

        def noted(self, group, *args):
            read.append(group)
            return load(self, group, *args)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
        assert [i for i, _ in batches.every(1, 2)] == [1, 3]
        assert read == [1, 3]
        list(open_data("d.parquet", batch_size=3))
        assert read == [1, 3, 0, 1, 2, 3, 4]  # each once

    def test_images_beside_a_file(self, place):
        """On disk only: a file does not make us ask the network."""
        Image.fromarray(PIXELS[3]).save("3.png")
        schema = datasets.Features({"image": datasets.Image()}).arrow_schema
        pq.write_table(pa.table({"image": [{"bytes": None, "path": str(place / "3.png")}]}, schema=schema), "d.parquet")
        np.testing.assert_array_equal(joined(open_data("d.parquet"))[0], INPUT[3:4])
        pq.write_table(
            pa.table({"image": [{"bytes": None, "path": "http://127.0.0.1:9/a.png"}]}, schema=schema), "d.parquet"
        )
        with pytest.raises(DataError, match=r"sample 0 \(http.*No such file"):
            list(open_data("d.parquet"))

    def test_files_with_other_columns(self):
        for name, column in (("a", "x"), ("b", "z")):
            pq.write_table(pa.table({column: [1.0]}), f"{name}.parquet")
        with pytest.raises(DataError, match=r"b\.parquet has other columns than a\.parquet"):
            open_data("*.parquet")


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("hf:local", "next(iter(batches)); raise SystemExit(3)"),
        ("local/train.parquet", "next(iter(batches)); raise SystemExit(3)"),
        ("local/train.parquet", "left_open = iter(batches); next(left_open); raise SystemExit(3)"),
    ],
)
def test_leaving_early_does_not_end_the_process(place, word, code):
    """With pyarrow 26 and datasets 5.2, a stream of parquet that is left without a word ends the process with SIGABRT."""
    (place / "local").mkdir()
    pq.write_table(pa.table({"x": np.arange(200_000.0)}), "local/train.parquet", row_group_size=1000)
    source = f"import sys\nfrom bnctl.data.open import open_data\nbatches = open_data({word!r})\n{code}\n"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, cwd=place)
    assert (done.returncode, done.stderr) == (3, "")


def test_shards_are_read_when_their_turn_comes(place):
    """Only the first five samples are looked at before; a whole dataset in memory would meet the broken shard at once."""
    write_shards()
    (place / "01.tar").write_bytes(b"broken")
    passing = iter(open_data("0*.tar", batch_size=2))
    for i in range(2):
        np.testing.assert_array_equal(next(passing).args[0], INPUT[2 * i : 2 * i + 2])
    with pytest.raises(DataError, match="cannot be read from sample 4 on"):
        next(passing)


class Hub:
    """In place of the library's loader: notes what it is asked for, and makes noise."""

    def __init__(self, noise):
        self.noise = noise
        self.asked = []

    def __call__(self, name, **options):
        self.asked.append((name, options))
        self.noise()

        def rows():
            self.noise()
            for i in range(10):
                yield {"x": X[i].ravel().tolist(), "label": int(LABELS[i])}

        return datasets.IterableDataset.from_generator(rows)


@pytest.mark.parametrize(("word", "split"), [("hf:some/name", "train"), ("hf:some/name:validation", "validation")])
def test_what_the_hub_is_asked_for(monkeypatch, word, split):
    """The loader does not know its columns, as those of csv files; a control that it was called is that it gives the samples."""
    hub = Hub(lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    got, labels = joined(open_data(word, batch_size=4))
    np.testing.assert_array_equal(got, X.reshape(10, -1))
    np.testing.assert_array_equal(labels, LABELS)
    assert hub.asked == [("some/name", {"split": split, "streaming": True})]


def test_a_failing_hub(monkeypatch):
    def fail():
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", Hub(fail))
    with pytest.raises(DataError, match="hf:some/name cannot be opened: ConnectionError: no route") as caught:
        open_data("hf:some/name")
    assert "hf:NAME:SPLIT" in caught.value.hint


def test_no_samples(monkeypatch):
    empty = datasets.IterableDataset.from_generator(lambda: iter(()))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: empty)
    with pytest.raises(DataError, match="hf:some/name holds no samples"):
        list(open_data("hf:some/name"))
    with pq.ParquetWriter("d.parquet", pa.schema({"x": pa.float32()})):
        pass
    with pytest.raises(DataError, match=r"d\.parquet holds no samples"):
        list(open_data("d.parquet"))


def test_the_library_is_quiet(monkeypatch, capfd, caplog):
    def noise():
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        datasets.logging.get_logger("datasets.load").error("something")

    monkeypatch.setattr(datasets, "load_dataset", Hub(noise))
    before = datasets.logging.get_verbosity()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(open_data("hf:some/name"))
        assert (caught, caplog.messages, *capfd.readouterr()) == ([], [], "", "")
        assert datasets.logging.get_verbosity() == before
        noise()  # the control: both are heard otherwise
        assert [str(w.message) for w in caught] == ["deprecated"]
        assert caplog.messages == ["something"]
