"""The built-in data sets, known by name. An entry in :data:`SOURCES` adds another one.

An entry says where a data set is on the hub or on disk, which of its files to use, and the names of its columns. A
``[[training.source]]`` table in a settings file does the same without code.
"""

from dataclasses import dataclass
from typing import Literal

from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class Source:
    """One of several data sets. Only path is needed; the defaults suit most layouts."""

    name: str
    """
    Name of a built-in data set, whose settings then are the defaults of this table; or any other name, which is used in
    messages. Default: the last part of path.
    """

    path: str
    """Local folder or file, or hub name (owner/name). Not needed for a built-in data set."""

    format: Literal["auto", "parquet", "arrow", "audio", "manifest", "kaldi", "lhotse", "webdataset", "codes"] = "auto"
    """
    Format of the files: "parquet" or "arrow" tables; "audio" files; "manifest" (.jsonl, .csv, .tsv; also NeMo's) with
    the paths of audio files; "kaldi" folders (wav.scp, text, segments); "lhotse" manifests (cuts, or recordings and
    supervisions, as .jsonl or .jsonl.gz); "webdataset" tars; "codes" that were tokenized before. "auto": the format of
    the files that are there.
    """

    subset: str | None = None
    """Use only files of this subset: its name is that of a folder above them, or part of their own names."""

    split: str | None = None
    """
    Use only files of this split, found in the same way. Default: split train if the names contain splits, else all
    files.
    """

    files: tuple[str, ...] = ()
    """
    Use only files that match one of these patterns, relative to path. * is any part of a name, **/ any number of
    folders.
    """

    exclude: tuple[str, ...] = ()
    """Leave out files whose name, or a folder above them, begins with one of these words."""

    audio: str = "audio"
    """
    Column or key of the recording. It holds bytes, a struct of bytes and path, a struct of array and sampling_rate, or
    a path relative to the table. In a tar: the file extension of recordings.
    """

    text: str = "text"
    """
    Column or key of the transcription; only tasks with text need it. In a Kaldi folder: the name of the file.
    """

    duration: str | None = None
    """
    Column or key of the duration, in milliseconds if its name ends in _ms, else in seconds. Default: duration,
    duration_ms or audio_duration.
    """

    id: str = "id"
    """Column or key of the name of a recording."""

    weight: float | None = None
    """
    Share of the draws from this data set, relative to the weights of the others. A draw is a recording, or a piece of
    one if stored codes are split. Either all tables have a weight or none. Without weights, an epoch contains each
    recording once.
    """

    min_seconds: float | None = None
    """Leave out shorter recordings."""

    max_seconds: float | None = None
    """Leave out longer recordings; training.max_seconds cuts them instead."""

    revision: str | None = None
    """Branch, tag or commit, if path is a hub name."""

    # The next fields are not keys of a table: facts from the publisher, and how to download data that cannot be read
    # directly from the hub.
    hours: float | None = None
    licence: str = ""
    download: str = ""

    def admits(self, seconds: float | None) -> bool:
        """Whether a duration is within the limits. An unknown duration is admitted until the recording is decoded."""
        if seconds is None:
            return True
        return (self.min_seconds or 0.0) <= seconds and (self.max_seconds is None or seconds <= self.max_seconds)


# A path that starts with ./ marks a data set that cannot be read directly from the hub.
SOURCES = {
    source.name: source
    for source in (
        Source(
            name="peoples_speech",
            path="MLCommons/peoples_speech",
            format="parquet",
            files=("**/train-*.parquet",),
            exclude=("microset", "validation", "test"),
            duration="duration_ms",
            hours=30_000,
            licence="CC BY and CC BY-SA",
        ),
        Source(
            name="librispeech_asr_train",
            path="openslr/librispeech_asr",
            format="parquet",
            files=("**/train.500/*.parquet",),
            exclude=("all", "clean"),
            hours=500,
            licence="CC BY 4.0",
        ),
        Source(
            name="librispeech_960",
            path="openslr/librispeech_asr",
            format="parquet",
            files=("**/train.*/*.parquet",),
            exclude=("all",),
            hours=960,
            licence="CC BY 4.0",
        ),
        Source(
            name="librispeech_asr_test",
            path="openslr/librispeech_asr",
            format="parquet",
            files=("clean/test/*.parquet",),
            hours=5,
            licence="CC BY 4.0",
        ),
        # Whole chapters in FLAC, without transcriptions: small/SPEAKER/BOOK/NAME.flac.
        Source(
            name="libri_light",
            path="./data/libri_light",
            format="audio",
            files=("**/small/**/*.flac", "**/medium/**/*.flac", "**/large/**/*.flac"),
            hours=57_700,
            licence="public domain",
            download="download small.tar, medium.tar and large.tar, which github.com/facebookresearch/libri-light "
            "links to, and unpack them in one folder",
        ),
        # Tars of MP3 and JSON; access is granted on the hub.
        Source(
            name="emilia",
            path="amphion/Emilia-Dataset",
            format="webdataset",
            files=("**/Emilia/EN/*.tar",),
            audio="mp3",
            duration="duration",
            hours=46_800,
            licence="CC BY-NC 4.0",
        ),
        Source(
            name="emilia_yodas",
            path="amphion/Emilia-Dataset",
            format="webdataset",
            files=("**/Emilia-YODAS/EN/*.tar",),
            audio="mp3",
            duration="duration",
            hours=92_200,
            licence="CC BY 4.0",
        ),
        # The transcribed part: unpacked tars of WAV. Its table of transcriptions names no files.
        Source(
            name="voxpopuli",
            path="./data/voxpopuli",
            format="audio",
            files=("**/en/train/**/*.wav",),
            hours=520,
            licence="CC0 1.0",
            download="hf download facebook/voxpopuli --repo-type dataset --include 'data/en/train/*' --local-dir "
            "./data/voxpopuli, and unpack each tar.gz where it lies",
        ),
        # English is missing in facebook/multilingual_librispeech on the hub.
        Source(
            name="mls_english",
            path="parler-tts/mls_eng",
            format="parquet",
            files=("**/train-*.parquet", "**/train/*.parquet"),
            exclude=("dev", "test"),
            text="transcript",
            duration="audio_duration",
            hours=44_500,
            licence="CC BY 4.0",
        ),
        # Unpacked tars of WAV segments; access is granted on the hub. A larger set adds files to the smaller ones.
        Source(
            name="gigaspeech",
            path="./data/gigaspeech",
            format="audio",
            files=("**/xs_files/**/*.wav", "**/*_files_additional/**/*.wav"),
            exclude=("dev", "test"),
            hours=10_000,
            licence="for non-commercial research and education",
            download="hf download speechcolab/gigaspeech --repo-type dataset --include 'data/audio/*' --local-dir "
            "./data/gigaspeech, and unpack each tar.gz where it lies",
        ),
        # All data sets below one folder, in proportion to their sizes.
        Source(
            name="mixture",
            path="./data",
            format="parquet",
            files=("**/*train*.parquet", "**/*train*/*.parquet"),
            exclude=("microset", "validation", "test", "dev"),
            download="put the data sets there, or name others in [[training.source]] tables",
        ),
    )
}
ALIASES = {
    "all": "mixture",
    "librispeech": "librispeech_960",
    "librispeech_asr": "librispeech_asr_test",
}


def find_source(name: str) -> Source:
    """The built-in data set of a name or alias.

    Raises:
        UserError: the name is unknown.
    """
    try:
        return SOURCES[ALIASES.get(name, name)]
    except KeyError:
        known = ", ".join(sorted([*SOURCES, *ALIASES]))
        raise UserError(
            f"unknown data set {name!r} (known: {known}); describe any other data set in a [[training.source]] table."
        ) from None
