"""Text to speak: its clean-up, and its sentences."""

import re

MAX_SENTENCE_CHARS = 300
"""Some twenty seconds of speech; models lose the thread in what is much longer."""

_ABBREVIATION = re.compile(
    r"mr|mrs|ms|mx|dr|prof|rev|hon|st|sr|jr|messrs|gen|col|capt|lt|sgt|gov|sen|rep|pres"
    r"|e\.g|i\.e|cf|vs|viz|al|approx|no|nos|vol|vols|pp|fig|figs|eq|ch|sec|ed|eds|dept|est|inc|ltd"
    r"|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mt|ft|ave|blvd|a\.m|p\.m"
)
"""What a full stop does not end a sentence after."""

_PARAGRAPH = re.compile(r"\n\s*\n")
_CLOSERS = "\"'”’»)\\]}」』）】》〉"
_MARKS = ".!?…"
# A run of marks is looked at once and as a whole, or many of them would take quadratic time.
_END = re.compile(
    rf"[。！？｡]+…*(?:[{_MARKS}]+(?![^\s{_CLOSERS}]))?[{_CLOSERS}]*\s*"
    rf"|(?<![{_MARKS}])(?=(?P<mark>[{_MARKS}]+))(?P=mark)(?P<closers>[{_CLOSERS}]*)(?:\s+|$)"
    rf"|[।؟۔]+[{_CLOSERS}]*\s*"
)
_LAST_WORD = re.compile(r"[^\s\"'“‘«(\[{]*\Z")
_CLAUSE = re.compile(r"[,;:—–](?=\s)\s*|[，、；：]\s*")
_DESIGN = re.compile(r"\s*(?:\([^()]*\)|（[^（）]*）)\s*")


def clean_text(text: str) -> str:
    """Make one space of every run of white space, as the reference does with what it is to say."""
    return re.sub(r"\s+", " ", text)


def split_voice_design(text: str) -> tuple[str, str]:
    """Split off the description of a voice in parentheses that a text begins with.

    The description is empty if there is none; it and the rest, joined, are the text.
    """
    match = _DESIGN.match(text)
    end = match.end() if match and match.end() < len(text) else 0
    return text[:end], text[end:]


def split_sentences(text: str, max_chars: int = MAX_SENTENCE_CHARS) -> list[str]:
    """Split a text where a speaker would take a breath.

    A sentence longer than `max_chars` is split after a clause, else a word, else wherever it is.
    A voice's description in parentheses stays in one piece with the first sentence.

    Args:
        text: Any text; an empty line ends a sentence too.
        max_chars: Characters of a piece at most, 1 or more.

    Returns:
        Pieces that are not blank, with the white space behind them: joined, they are the text
        after `clean_text`, but for white space at its start.
    """
    paragraphs = [clean_text(part).strip() for part in _PARAGRAPH.split(text)]
    # What ends the text is white space too, so that joined pieces are the whole.
    tail = " " if text[-1:].isspace() else ""
    sentences: list[str] = []
    for paragraph in filter(None, paragraphs):
        for sentence in _sentences(paragraph):
            for piece in _pieces(sentence, max_chars):
                _append(sentences, piece, max_chars)
        sentences[-1] += " "
    if sentences:
        sentences[-1] = sentences[-1][:-1] + tail
    return sentences


def _append(sentences: list[str], piece: str, max_chars: int) -> None:
    """Add a piece; marks alone, which nobody can speak, go to the one before."""
    is_speech = any(map(str.isalnum, piece))
    if sentences and not is_speech and len(sentences[-1]) + len(piece) <= max_chars:
        sentences[-1] += piece
    else:
        sentences.append(piece)


def _sentences(paragraph: str) -> list[str]:
    design, speech = split_voice_design(paragraph)
    sentences, start = [], 0
    for match in _END.finditer(speech):
        if match.end() < len(speech) and _is_end(speech, start, match):
            sentences.append(speech[start : match.end()])
            start = match.end()
    sentences.append(speech[start:])
    return [design + sentences[0], *sentences[1:]]


def _is_end(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether a mark ends a sentence that began at `start`."""
    if text[match.end()].islower() and (match["mark"] == "." or match["closers"]):
        return False  # also: "Why?" she asked.
    if match["mark"] != ".":
        return True
    # A longer word is no abbreviation, and a text without spaces would be read again and again.
    before = text[max(start, match.start() - 16) : match.start()]
    found = _LAST_WORD.search(before)
    word = found.group().lower() if found else ""
    is_initial = len(word) == 1 and word.isalpha()
    is_numbering = word.isdigit() and before == word  # "1. Wash the rice."
    return not (_ABBREVIATION.fullmatch(word) or is_initial or is_numbering)


def _pieces(sentence: str, max_chars: int) -> list[str]:
    """A sentence in pieces that are short enough; white space at their end does not count."""
    pieces, start, end = [], 0, len(sentence.rstrip())
    while end - start > max_chars:
        window = sentence[start : start + max_chars + 1]
        cut = _last_clause(window) or window.rfind(" ") + 1 or max_chars
        pieces.append(sentence[start : start + cut])
        start += cut
    return [*pieces, sentence[start:]]


def _last_clause(window: str) -> int:
    """Where the last clause of a window ends, if it leaves a piece worth speaking."""
    ends = [match.end() for match in _CLAUSE.finditer(window) if match.end() < len(window)]
    return ends[-1] if ends and ends[-1] >= len(window) // 4 else 0
