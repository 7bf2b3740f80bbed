"""The data sets of the papers: sizes, files, and the checksum of every file.

The files are those of the ``uci_datasets`` collection at one fixed commit. A
checksum is either ``sha256:...`` or ``git-blob:...``, the name git itself gives
to a file's content (SHA-1 of a short header and the bytes). The second kind pins
the four large sets, whose blob names are in the collection's tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MASK = "test_mask.csv.gz"
NUM_SPLITS = 10


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before it is read.

    Attributes:
        n: Rows, training and test together.
        d: Input columns.
        files: File name -> checksum. Every file but the mask holds rows of data,
            in this order.
    """

    n: int
    d: int
    files: Mapping[str, str]


def _held(n: int, d: int, data: str, mask: str) -> DatasetInfo:
    files = {"data.csv.gz": f"sha256:{data}", MASK: f"sha256:{mask}"}
    return DatasetInfo(n, d, files)


def _large(n: int, d: int, data: Mapping[str, str], mask: str) -> DatasetInfo:
    files = {name: f"git-blob:{value}" for name, value in data.items()}
    return DatasetInfo(n, d, {**files, MASK: f"sha256:{mask}"})


DATASETS: Mapping[str, DatasetInfo] = {
    "pol": _held(
        15000,
        26,
        "1c16126352954571e78f52d5a9d1b947a38655885d7cadd9407a4c9615fe4e04",
        "c5540259aabe58f5c7a534ed6f5141f8c1157d5de592e45884b7fced6091e981",
    ),
    "elevators": _held(
        16599,
        18,
        "e39bc18a80ec3611e4fd76d0f86ee377e96ba21b568b9997576d538dafe56b7b",
        "9fe662eacca95ae2c9301cbc4c4134e55d58e903cb0cfb683771ffdd2d248eb5",
    ),
    "bike": _held(
        17379,
        17,
        "411f76ae426c0e348a2629dcf6b3b29102c7db465eae780a3454c39db1dfac4f",
        "cf13dc25e80c03019cf2b01666f9cc29b03ea222f5c519536023ea56669bf337",
    ),
    "protein": _held(
        45730,
        9,
        "f709d0107c3ee90ab019b9e5d77fc2ae182158958cb70b1903236a51334fd01b",
        "22afe05e8d17c428558d78a77efeecc08d58004b6c95741d1c533c3207c69fe9",
    ),
    "keggdirected": _held(
        48827,
        20,
        "51b7bb56e3f3eae36273cdd5a549c042bdf0ec10948a6f8e6b01a1d6912212cd",
        "b8a7fc902444fdbc5866e8bf314e4778a303d675ef5267c83c5c25b70dacd357",
    ),
    "3droad": _large(
        434874,
        3,
        {"data.csv.gz": "5dd7bcf3ee14eb8de41ddea4059d1424bb0b5d81"},
        "05a88da30f7a47a02b68a421d32a9c14515572c7d263607b1177081bfe236d95",
    ),
    "song": _large(
        515345,
        90,
        {
            "data.csv.gz": "5910ee3acb64aeb87570a4523fd6ad6fd7bf1f18",
            "data1.csv.gz": "9fe898cc92b9d3fd1e8690a027de05befea13428",
        },
        "f387bbbe8653be2c0223e0c59dbe37a2285263aed8e960c90a58f00729f00474",
    ),
    "buzz": _large(
        583250,
        77,
        {"data.csv.gz": "8eb0b112fe8ca2f868fcf2adb644605b740e722a"},
        "c33a2772d7536ff6aad46335305845ff08c0df35c590fd7dbac3433aaf400f6b",
    ),
    "houseelectric": _large(
        2049280,
        11,
        {"data.csv.gz": "d8979c231b99d34009ca8a82b2fef4aea7fe5363"},
        "2d49f5ff1a54968913e2a9163d630a528e73ea775e9a808ad9101dec80227cea",
    ),
    "yacht": _held(
        308,
        6,
        "88ec8ea1a979ab0628a54392822c60b3699ea22541e912e83246f7d49f5adad1",
        "2f6d6b091146887589db66073317b8485e853d27e664b99b8b402ad57ba4a936",
    ),
    "concrete": _held(
        1030,
        8,
        "542c5d9a0d301bdb47550280398dcbbe2fb8404631fc945de1ea6df9ade741c6",
        "fae0926c655e4f9fb5669d0dbf2226bd8ff7daaadbd376adb8f32eac6f752e7e",
    ),
    "energy": _held(
        768,
        8,
        "431b6df04243db782bbcd45e408373a654334496ebe5d9c9985ab2e826a39f51",
        "217df2cd4cabf818390e26a65384ea113c95b75bd687787a37ed2f87f28c9bb8",
    ),
}
