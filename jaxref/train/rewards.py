"""What a sampled continuation is worth: rewards that a program computes.

A reward is a function of a prompt, the first line of a definition, and of the bytes that were
written after it.
"""

import ast
import re
import warnings

_END_OF_BODY = re.compile(rb"\0|(?:^|\n)(?=[^ \t\r\n\0])")


def body_length(completion: bytes) -> int | None:
    """How many bytes belong to the body of the definition that they continue: all before the first
    line that is not indented, or byte 0. None where the body does not end.

    Args:
      completion: what was written after a header.

    Returns:
      The length; 0 where the first line is not indented.

    >>> body_length(b"    return x\\n\\ndef g"), body_length(b"    return"), body_length(b"x = 1")
    (14, None, 0)
    """
    found = _END_OF_BODY.search(completion)
    return None if found is None else found.end() if found.group() == b"\n" else found.start()


def parses(header: bytes, completion: bytes) -> float:
    """1 where Python's parser takes a header and the body after it for a definition, else 0.

    Of a body without an end, the last line, which may be a part of one, is left out.

    Args:
      header: the first line of a definition, with its line end.
      completion: what was written after it, in UTF-8; what is not has 0.

    Returns:
      0.0 or 1.0.

    >>> parses(b"def f():\\n", b"    1 +\\n\\ndef g"), parses(b"def f():\\n", b"    pass\\n  ")
    (0.0, 1.0)
    """
    end = body_length(completion)
    body = completion[: completion.rfind(b"\n") + 1] if end is None else completion[:end]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are none
            ast.parse((header + body).decode())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    return 1.0


def definition_headers(text: bytes, longest: int) -> list[bytes]:
    """The lines of a Python source that begin a definition and are complete, up to so many bytes.

    Args:
      text: the source.
      longest: bytes of a line, its end included.

    Returns:
      Lines that begin with "def " or "class " in the first column and end with a colon, in their
      order.

    >>> definition_headers(b"import a\\ndef f(x):\\n    pass\\nclass B:\\n", 40)
    [b'def f(x):\\n', b'class B:\\n']
    """
    lines = re.findall(rb"^(?:def|class) [^\n]*:\n", text, flags=re.MULTILINE)
    return [line for line in lines if len(line) <= longest]
