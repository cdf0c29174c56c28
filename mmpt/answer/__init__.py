"""How a request is answered: the stream of each row, and one writer for each medium."""
