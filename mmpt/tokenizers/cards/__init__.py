"""Report cards: one measurement for a codec, for its baseline and for its ceiling.

`system` says what is measured, `baseline` fits the other side at equal bits, and `visual`, `speech`
and `text` measure a medium. Every block of a card has the same keys; a key is None where a thing
has no such number, as a ceiling without codes has no usage.
"""
