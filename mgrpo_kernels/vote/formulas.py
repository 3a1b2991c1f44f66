r"""A parser of formulas in normal form: arithmetic, letters, roots, powers and the usual functions.

It reads the whole text or nothing: what it does not know raises :class:`UnreadError`, and never becomes "the first number in it".
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from mgrpo_kernels.vote.tokens import (
    FUNCTIONS,
    POSTFIX_WORDS,
    Token,
    UnreadError,
    is_product_of_letters,
    scale_of,
    tokens_of,
)

Node = tuple[Any, ...]
"""A node of a formula's tree: its kind, then its operands. Kinds: number, symbol, neg, +, *, /, ^, !, root, call, pm."""

MAX_DEPTH = 40


class Parser:
    """Reads tokens by recursive descent.

    Args:
        tokens: of one formula.
    """

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def formula(self) -> Node:
        """Return the tree of the whole formula.

        Raises:
            UnreadError: some of it is not understood.
        """
        node = self._sum()
        if self.at < len(self.tokens):
            raise UnreadError(self.tokens[self.at].text)
        return node

    def _peek(self, *texts: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at].text in texts

    def _take(self, *texts: str) -> bool:
        if self._peek(*texts):
            self.at += 1
            return True
        return False

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise UnreadError(f"no {text}")

    def _token(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadError("too deep")
        node = self._signed()
        while (token := self._token()) is not None and token.text in ("+", "-", "±"):
            self.at += 1
            term = self._product()
            node = (
                ("pm", node, term) if token.text == "±" else ("+", node, ("neg", term) if token.text == "-" else term)
            )
        self.depth -= 1
        return node

    def _signed(self) -> Node:
        if self._take("-"):
            return ("neg", self._signed())
        if self._take("+"):
            return self._signed()
        if self._take("±"):
            return ("pm", ("number", Fraction(0)), self._product())
        return self._product()

    def _product(self) -> Node:
        node = self._factor()
        while (token := self._token()) is not None:
            if token.text in ("*", "/"):
                self.at += 1
                right = self._factor()
                node = (token.text, node, right)
            elif self._starts_factor(token):
                node = ("*", node, self._factor())
            else:
                break
        return node

    def _starts_factor(self, token: Token) -> bool:
        """Return whether a factor starts here with no sign before it: a number does so only in a mixed number, read elsewhere."""
        if token.kind == "symbol":
            return True
        if token.kind == "word":
            return token.text in FUNCTIONS or token.text == "pi" or is_product_of_letters(token.text)
        return (
            token.text in ("(", "[", "{", "⌊", "⌈", "\\frac", "\\sqrt", "\\binom")
            or token.text.removeprefix("\\") in FUNCTIONS
        )

    def _factor(self) -> Node:
        if self._take("-"):
            return ("neg", self._factor())
        if self._take("+"):
            return self._factor()
        return self._postfixed(self._atom())

    def _postfixed(self, node: Node) -> Node:
        while (token := self._token()) is not None:
            if token.text == "^":
                self.at += 1
                node = ("^", node, self._exponent())
            elif token.text == "!":
                self.at += 1
                node = ("!", node)
            elif token.text == "°":  # of a function's argument; else it is a unit
                self.at += 1
                node = ("*", node, ("/", ("symbol", "π"), ("number", Fraction(180))))
            elif token.text == "%":
                self.at += 1
                node = ("/", node, ("number", Fraction(100)))
            elif token.text.lower() in POSTFIX_WORDS:
                self.at += 1
                node = ("^", node, ("number", Fraction(POSTFIX_WORDS[token.text.lower()])))
            elif token.text.lower() == "factorial":
                self.at += 1
                node = ("!", node)
            elif (
                token.kind == "word" and node[0] in ("number", "*", "/") and (scale := scale_of(token.text)) is not None
            ):
                self.at += 1
                node = ("*", node, ("number", scale))
            else:
                break
        return node

    def _exponent(self) -> Node:
        if self._take("{"):
            node = self._sum()
            self._expect("}")
            return node
        if self._take("-"):
            return ("neg", self._exponent())
        node = self._atom()
        return ("^", node, self._exponent()) if self._take("^") else node

    def _atom(self) -> Node:
        token = self._token()
        if token is None:
            raise UnreadError("ends early")
        self.at += 1
        if token.kind == "number":
            return self._number(token)
        if token.kind == "symbol":
            return self._symbol(token.text)
        if token.kind == "word":
            return self._word(token.text)
        if token.kind == "command":
            return self._command(token.text.removeprefix("\\"))
        closing = {"(": ")", "[": "]", "{": "}", "|": "|", "⌊": "⌋", "⌈": "⌉"}.get(token.text)
        if closing is None or (token.text == "|" and self._peek("|")):
            raise UnreadError(token.text)
        node = self._sum()
        self._expect(closing)
        function = {"|": "abs", "⌊": "floor", "⌈": "ceiling"}.get(token.text)
        return ("call", function, node) if function else node

    def _number(self, token: Token) -> Node:
        """Return a number, with the fraction of a mixed number or the base that follows it."""
        assert token.value is not None
        node: Node = ("number", token.value)
        if not token.text.isdigit():
            return node
        if self._peek("_"):
            return self._in_base(token.text)
        mixed = self.tokens[self.at : self.at + 8]
        if mixed and mixed[0].text == "\\frac":
            texts = [each.text for each in mixed[1:7]]
            if (
                len(texts) == 6
                and texts[0::2] != []
                and texts[0] == "{"
                and texts[2:4] == ["}", "{"]
                and texts[5] == "}"
            ):
                return self._mixed(node, mixed[2], mixed[5], 7)
        if len(mixed) >= 3 and mixed[0].kind == "number" and mixed[0].spaced and mixed[1].text == "/":
            return self._mixed(node, mixed[0], mixed[2], 3)
        return node

    def _mixed(self, whole: Node, over: Token, under: Token, length: int) -> Node:
        if not (over.text.isdigit() and under.text.isdigit()):
            return whole
        if over.value is None or not under.value or over.value >= under.value:
            raise UnreadError("no mixed number")
        self.at += length
        return ("number", whole[1] + over.value / under.value)

    def _in_base(self, digits: str) -> Node:
        """Return a number that is written in another base: 101_2."""
        self.at += 1
        braces = self._take("{")
        token = self._token()
        if token is None or not token.text.isdigit() or not 2 <= (base := int(token.text)) <= 36:
            raise UnreadError("no base")
        self.at += 1
        if braces:
            self._expect("}")
        if any(int(digit) >= base for digit in digits):
            raise UnreadError("no digit of the base")
        return ("number", Fraction(int(digits, base)))

    def _symbol(self, name: str) -> Node:
        name += self._subscript()
        while self._take("'"):
            name += "'"
        return ("symbol", name)

    def _subscript(self) -> str:
        if not self._take("_"):
            return ""
        if not self._take("{"):
            token = self._token()
            if token is None or token.kind not in ("number", "symbol"):
                raise UnreadError("no subscript")
            self.at += 1
            return f"_{token.text}"
        start = self.at
        while not self._peek("}"):
            if self._token() is None or self._peek("{"):
                raise UnreadError("no subscript")
            self.at += 1
        self.at += 1
        return "_" + "".join(each.text for each in self.tokens[start : self.at - 1])

    def _word(self, word: str) -> Node:
        if word in FUNCTIONS:
            return self._call(word)
        if word == "pi":
            return ("symbol", "π")
        if not is_product_of_letters(word):
            raise UnreadError(word)
        node: Node = ("symbol", word[0])
        for letter in word[1:-1]:
            node = ("*", node, ("symbol", letter))
        return ("*", node, self._postfixed(self._symbol(word[-1])))

    def _command(self, name: str) -> Node:
        if name in FUNCTIONS and name != "sqrt":
            return self._call(name)
        if name == "sqrt":
            index: Node = ("number", Fraction(2))
            if self._take("["):
                index = self._sum()
                self._expect("]")
            return ("root", index, self._argument())
        if name == "frac":
            over = self._argument()
            return ("/", over, self._argument())
        if name in ("binom", "dbinom", "tbinom"):
            n, k = self._argument(), self._argument()
            return ("/", ("!", n), ("*", ("!", k), ("!", ("+", n, ("neg", k)))))
        raise UnreadError(name)

    def _argument(self) -> Node:
        """Return a command's argument in braces, or, as people write it, in parentheses or a single token."""
        closing = {"{": "}", "(": ")"}
        token = self._token()
        if token is None:
            raise UnreadError("no argument")
        if token.text in closing:
            self.at += 1
            node = self._sum()
            self._expect(closing[token.text])
            return node
        return self._atom()

    def _call(self, name: str) -> Node:
        """Return a function's call: ``sin x``, ``sin 2x``, ``sin^2 x``, ``log_2 8``, ``sqrt(2)``."""
        power: Node | None = None
        base: Node | None = None
        while self._peek("^", "_"):
            if self._take("_"):
                base = self._exponent()
            elif self._take("^"):
                power = self._exponent()
        if name == "sqrt" and not self._peek("(", "{"):
            return ("root", ("number", Fraction(2)), self._atom())
        if self._peek("(", "{"):
            argument = self._argument()
        else:
            argument = self._factor()
            while (token := self._token()) is not None and self._starts_factor(token) and not _is_function(token):
                argument = ("*", argument, self._factor())
        if name == "sqrt":
            return ("root", ("number", Fraction(2)), argument)
        if power == ("neg", ("number", Fraction(1))) and name in ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh"):
            return ("call", f"arc{name}", argument)
        node: Node = ("call", name, argument) if base is None else ("/", ("call", "ln", argument), ("call", "ln", base))
        if base is not None and name != "log":
            raise UnreadError(name)
        return node if power is None else ("^", node, power)


def _is_function(token: Token) -> bool:
    return token.text.removeprefix("\\") in FUNCTIONS


def parse_formula(text: str) -> Node:
    """Return the tree of a formula in normal form.

    Raises:
        UnreadError: it is none, or not understood to its end.
    """
    return Parser(tokens_of(text)).formula()


def symbols_of(node: Node) -> set[str]:
    """Return the names of the variables in a formula; π, e and i are constants."""
    if node[0] == "symbol":
        return set() if node[1] in ("π", "e", "i") else {node[1]}
    return set().union(*(symbols_of(each) for each in node[1:] if isinstance(each, tuple)), set())
