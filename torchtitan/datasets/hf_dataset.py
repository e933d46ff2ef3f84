"""The data sets that are known by name. Another one needs one more entry in :data:`SOURCES`.

An entry says where a data set lies on the hub (or on disk), which of its files are meant, and what its columns are
called. A ``[[training.source]]`` table of a settings file says the same without code.
"""

from dataclasses import dataclass
from typing import Literal

from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class Source:
    """One data set of several. Only path is needed; what else is not said is found out."""

    name: str
    """
    A built-in data set, whose facts then hold unless the table says otherwise, or any other name, which is shown in
    messages. By default the last part of path.
    """

    path: str
    """Local folder or file, or hub name (owner/name). A built-in data set has its own place."""

    format: Literal["auto", "parquet", "arrow", "audio", "manifest", "kaldi", "lhotse", "webdataset", "codes"] = "auto"
    """
    What the files are: tables in parquet or Arrow, audio files, manifests (.jsonl, .csv, .tsv; NeMo's too) that name
    audio files, Kaldi folders (wav.scp, text, segments), lhotse's manifests (cuts, or recordings and supervisions, as
    .jsonl or .jsonl.gz), tars as WebDataset writes them, or codes tokenized beforehand. "auto": whatever lies there.
    """

    subset: str | None = None
    """Only files of this subset: in a folder of that name, or with names that begin with it."""

    split: str | None = None
    """
    Only files of this split, likewise. By default those of split train if the names tell splits, else all files.
    """

    files: tuple[str, ...] = ()
    """
    Only files that fit one of these patterns, relative to path: * is any part of a name, **/ any number of folders.
    """

    exclude: tuple[str, ...] = ()
    """Names of folders, or beginnings of names of files, to leave out."""

    audio: str = "audio"
    """
    Column or key with the recording: its bytes, a struct of bytes and path or of array and sampling_rate, or a path
    relative to the table. In a tar: the extension of recordings.
    """

    text: str = "text"
    """
    Column or key with the transcription, which only tasks with text need. In a Kaldi folder: the name of the file.
    """

    duration: str | None = None
    """
    Column or key with the length of a recording, in milliseconds if the name ends in _ms, else in seconds. By default
    duration, duration_ms or audio_duration.
    """

    id: str = "id"
    """Column or key with the name of a recording."""

    weight: float | None = None
    """
    Share of the draws that is of this data set, relative to the others' weights. A draw is a recording, of split codes
    a piece. Either all tables have one or none; without, each recording comes once an epoch.
    """

    min_seconds: float | None = None
    """Leave out recordings that are shorter."""

    max_seconds: float | None = None
    """Leave out recordings that are longer (training.max_seconds cuts them instead)."""

    revision: str | None = None
    """Branch, tag or commit, where path is a hub name."""

    # Facts that the publisher states, and how to get data that cannot be read from the hub as they lie there. They are
    # no keys of a table.
    hours: float | None = None
    licence: str = ""
    download: str = ""

    def admits(self, seconds: float | None) -> bool:
        """Whether the limits admit a recording of this length; one of unknown length is admitted for the time being."""
        if seconds is None:
            return True
        return (self.min_seconds or 0.0) <= seconds and (self.max_seconds is None or seconds <= self.max_seconds)


# A public data set is one entry here. An entry whose path starts with ./ cannot be read from the hub as it lies there.
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
        # The transcribed part, tars of WAV once they are unpacked. Transcriptions lie in a table that names no files.
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
        # English, which facebook/multilingual_librispeech lacks on the hub.
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
        # Segments as WAV once the tars are unpacked; access is granted on the hub. The larger sets add to the smaller.
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
        # Whatever lies below one folder, in proportion to its size.
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
    """The entry of a data set's name or alias.

    Raises:
        UserError: there is none.
    """
    try:
        return SOURCES[ALIASES.get(name, name)]
    except KeyError:
        known = ", ".join(sorted([*SOURCES, *ALIASES]))
        raise UserError(
            f"unknown data set {name!r} (known: {known}); any other is described by a [[training.source]] table."
        ) from None
