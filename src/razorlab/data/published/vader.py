"""VADER's sentences (Hutto and Gilbert, ICWSM 2014; MIT licence): tweets, film reviews, editorials and product reviews,
each scored by people from -4 (blame) to 4 (praise), as the source archive of vaderSentiment 3.3.2 holds them.

A sentence counts where its mean score is at least 0.5 from neutral; its class is the score's sign. No split is
published. Here the test split is every fifth document of each file, a document being a review or an editorial (a tweet
and a film review's snippet are one each), so that no document is in both splits.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

from razorlab.data.published.spec import Archive, Listing, PublishedSpec
from razorlab.data.spec import LabelledImages
from razorlab.data.texts import Texts

FILES = ("tweets", "movieReviewSnippets", "nytEditorialSnippets", "amazonReviewSnippets")
NEUTRAL = 0.5
TEST_EVERY = 5
MOST_BYTES = 10_000_000  # of one file
_FOLDER = "vaderSentiment-3.3.2"
_PAPER = f"{_FOLDER}/additional_resources/hutto_ICWSM_2014.tar.gz"


def _read(root: Path) -> Listing:
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for lines in _files(root / _PAPER):
        documents: dict[str, int] = {}
        for line in lines:
            name, score, text = line.split("\t", 2)
            number = documents.setdefault(name.partition("_")[0], len(documents))
            if abs(float(score)) >= NEUTRAL:
                part = "test" if number % TEST_EVERY == TEST_EVERY - 1 else "train"
                parts[part].append((text.strip(), int(float(score) > 0)))
    train, test = (
        LabelledImages(Texts(tuple(text for text, _ in part)), tuple(label for _, label in part))
        for part in parts.values()
    )
    return Listing(train, test, ("blame", "praise"), texts=True)


def _files(archive: Path) -> list[list[str]]:
    """The lines of each file; nothing is unpacked."""
    try:
        with tarfile.open(archive) as tar:
            members = [tar.getmember(f"hutto_ICWSM_2014/{name}_GroundTruth.txt") for name in FILES]
            if any(not member.isfile() or member.size > MOST_BYTES for member in members):
                raise ValueError("a member is no file, or too large")
            return [tar.extractfile(member).read().decode("utf-8").splitlines() for member in members]
    except tarfile.TarError as error:
        raise ValueError(f"{archive.name} is no tar archive ({error})") from error


VADER = PublishedSpec(
    name="vader",
    classes=2,
    train=15_537,
    test=3_922,
    archives=(
        Archive(
            name=f"{_FOLDER}.tar.gz",
            md5="a04f43dfcc57119bcabaa12f356c8c40",
            url=None,
            package="vaderSentiment==3.3.2",
            into="",
            makes=_FOLDER,
            max_bytes=20_000_000,
            labels=(_PAPER,),
        ),
    ),
    read=_read,
    source="Hutto and Gilbert, ICWSM 2014",
    split="every fifth document is for testing",
)
