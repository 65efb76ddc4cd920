"""An engine's options as data, a file per version: what it does not know, and what was meant.

Imports common/ and launch/arguments.py. The files are in launch/engines/.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from typing import Any

from common.talk import die
from launch.arguments import flags_of, value_of

DATA = Path(__file__).with_name("engines")


@dataclass(frozen=True)
class Options:
    """What one version of an engine takes, on its command line and in its YAML."""

    version: str
    flags: Collection[str]
    switches: Collection[str]  # flags without a value
    aliases: Mapping[str, str]  # from a flag's other name to its first one
    choices: Mapping[str, Sequence[str]]  # a flag's values, if they are few
    yaml_keys: Collection[str]
    sub_keys: Mapping[str, Collection[str]]  # the known inner keys of some YAML keys

    def values(self, flag: str) -> Collection[str]:
        return self.choices.get(flag, ())

    def below(self, key: str) -> Collection[str]:
        return self.sub_keys.get(key, ())


@cache
def versions(engine: str) -> dict[str, Options]:
    """The options of an engine, by version, for all versions that are known."""
    found = sorted(DATA.glob(f"{engine}-*.json"))
    named = ((path, path.stem[len(engine) + 1 :]) for path in found)
    return {version: Options(version, **json.loads(path.read_text())) for path, version in named}


def union(engine: str, field: str) -> set[str]:
    """All names that any version has."""
    return {name for known in versions(engine).values() for name in getattr(known, field)}


def first_name(engine: str, flag: str) -> str:
    """A flag's first name, by any version that has several; else the flag itself."""
    names = (known.aliases.get(flag) for known in versions(engine).values())
    return next(filter(None, names), flag)


class Check:
    """Raises Failure for what a version of an engine would refuse, with what was meant."""

    def __init__(self, engine: str, program: str, version: str, setting: str) -> None:
        self.setting = setting  # the setting that names another version
        self.engine, self.known = engine, versions(engine)[version]
        self.name = f"{program} {version}"
        self.others = [each for each in versions(engine).values() if each is not self.known]

    def flags(self, args: Sequence[str]) -> None:
        hint = f"that is the image's version; {self.setting}= names another one"
        for flag in flags_of(args, union(self.engine, "switches")):
            if flag not in self.known.flags:
                die(f"{self.name} has no option {flag}{self.meant_by(flag)}", hint=hint)
        for flag, choices in self.known.choices.items():
            value = value_of(args, flag)
            if value is not None and value not in choices:
                meant = self.meant(value, partial(Options.values, flag=flag))
                takes = f"{', '.join(choices)}, not {value!r}{meant}"
                die(f"{self.name} takes for {flag}: {takes}", hint=hint)
        for word in args:
            flag, equals, _ = word.partition("=")
            if equals and flag in self.known.switches:
                die(f"{self.name} takes no value for {flag}", hint=f"write {flag} alone")

    def keys(self, config: Mapping[str, Any], path: str) -> None:
        unknown = f"the config file {path} has the unknown key"
        hint = f"{self.name} refuses what it does not know"
        for key in map(str, config):
            if key not in self.known.yaml_keys:
                die(f"{unknown} {key}{self.meant_by_key(key)}", hint=hint)
        for key, names in self.known.sub_keys.items():
            inner = config.get(key)
            for name in map(str, inner if isinstance(inner, dict) else ()):
                if name not in names:
                    meant = self.meant(name, partial(Options.below, key=key))
                    die(f"{unknown} {name} below {key}{meant}", hint=hint)

    def meant_by(self, flag: str) -> str:
        written = "--" + flag.lstrip("-").replace("-", "_")
        names, keys = self.synonyms(written)
        text = self.meant(written, lambda each: each.flags, names)
        return text + (f"; the YAML file has the key {min(keys)}" if keys and not names else "")

    def meant_by_key(self, key: str) -> str:
        text = self.meant(key, lambda each: each.yaml_keys, self.synonyms(f"--{key}")[1])
        owners = [owner for owner, inner in self.known.sub_keys.items() if key in inner]
        return text + (f"; it belongs below {' or '.join(owners)}" if owners else "")

    def synonyms(self, flag: str) -> tuple[set[str], set[str]]:
        """Our version's names for a flag of any version, and its YAML keys for it."""
        first = first_name(self.engine, flag)
        every = {*union(self.engine, "flags"), flag, first}
        names = {name for name in every if first_name(self.engine, name) == first}
        keys = {name[2:] for name in names} & {*self.known.yaml_keys}
        return names & {*self.known.flags}, keys

    def meant(
        self, word: str, of: Callable[[Options], Collection[str]], names: Collection[str] = ()
    ) -> str:
        """` (1.2.1 has it); did you mean --tp_size?`: one of `names`, else what looks like it."""
        if word in names:  # only the spelling was another
            return f"; did you mean {word}?"
        having, near = " and ".join(e.version for e in self.others if word in of(e)), sorted(names)
        if not near and not having:
            near = get_close_matches(word, list(of(self.known)), 1, 0.8)
        text = f" ({having} has {word})" if having else ""
        return text + (f"; did you mean {near[0]}?" if near else "")
