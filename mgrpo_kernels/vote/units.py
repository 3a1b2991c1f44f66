"""Units of measurement and currencies: the words that may follow a number without changing it.

The list is ours and not pint's, because pint reads words of ordinary answers as units ("am" is an attometer, "at" a technical
atmosphere, "R" the gas constant), has no currencies, and is an optional package: labels must not depend on what is installed.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """A unit that is a multiple of its dimension's first one."""

    dimension: str
    factor: Fraction


_CURRENCIES = """
dollar dollars usd aud cad nzd hkd sgd euro euros eur gbp sterling yen jpy yuan cny rmb rupee rupees rs inr won krw
rouble roubles ruble rubles rub peso pesos mxn franc francs chf krona kronor sek nok dkk real reais brl rand zar lira try shekel
shekels ils baht thb ringgit myr dirham aed riyal sar naira ngn cent cents pence
"""
CURRENCY_SIGNS = "$€£¥₹¢₩₽₪฿₫₦"

# One line for each dimension: name=factor, all spellings of one factor joined by |.
_SCALED = {
    "length": """
        m|meter|meters|metre|metres=1 in|inch|inches=127/5000 ft|foot|feet=381/1250 yd|yds|yard|yards=1143/1250
        mi|mile|miles=201168/125 au=149597870700 nmi=1852""",
    "mass": """
        g|gram|grams|gramme|grammes|gm|gms=1 lb|lbs|pound|pounds=45359237/100000 oz|ounce|ounces=45359237/1600000
        ton|tons|tonne|tonnes=1000000 stone|stones=317514659/50000 carat|carats=1/5""",
    "time": """
        s|sec|secs|second|seconds=1 min|mins|minute|minutes=60 h|hr|hrs|hour|hours=3600 day|days=86400 week|weeks|wk|wks=604800
        month|months|mo|mos=2629746 yr|yrs|year|years=31556952 decade|decades=315569520 century|centuries=3155695200""",
    "volume": """
        l|L|liter|liters|litre|litres=1 gal|gallon|gallons=473176473/125000000 qt|qts|quart|quarts=473176473/500000000
        pint|pints=473176473/1000000000 cup|cups=473176473/2000000000 tbsp|tablespoon|tablespoons=473176473/32000000000
        tsp|teaspoon|teaspoons=157725491/32000000000 cc=1/1000""",
    "angle": "degree|degrees|deg|degs|°=1 arcmin|arcminute|arcminutes=1/60 arcsec|arcsecond|arcseconds=1/3600",
}
# Units that stand alone: no sum of two of them is taken.
_OTHERS = """
N newton newtons J joule joules W watt watts V volt volts A amp amps ampere amperes Hz hertz Pa pascal pascals K kelvin kelvins
mol mole moles ohm ohms F farad farads C coulomb coulombs tesla teslas Wb weber webers henry henries lm lumen lumens lx lux
Bq becquerel Gy gray Sv sievert cd candela eV cal calorie calories kcal Cal Calories bar bars atm psi mmHg dyn dyne dynes erg ergs
ha hectare hectares acre acres rad rads radian radians sr steradian rev revolution revolutions rpm mph kph kmh kmph fps mps knot
knots celsius fahrenheit centigrade bit bits byte bytes B bps dB decibel decibels hp horsepower unit units pixel pixels px
amu dalton daltons lightyear lightyears parsec parsecs pc sqft sqm kWh Wh Ah mAh
"""
_PREFIXES = {
    "k": 3,
    "c": -2,
    "m": -3,
    "d": -1,
    "M": 6,
    "G": 9,
    "n": -9,
    "p": -12,
    "T": 12,
    "h": 2,
    "\u03bc": -6,
    "\u00b5": -6,
}
_PREFIX_WORDS = {
    "kilo": 3,
    "centi": -2,
    "milli": -3,
    "deci": -1,
    "mega": 6,
    "giga": 9,
    "nano": -9,
    "micro": -6,
    "tera": 12,
}
_PREFIXED = ("m", "g", "s", "l", "L", "N", "J", "W", "V", "A", "Hz", "Pa", "mol", "F", "C", "eV", "cal", "bar", "Wh")
_PREFIXED_WORDS = (
    "meter meters metre metres gram grams gramme grammes second seconds liter liters litre litres newton "
    "newtons joule joules watt watts volt volts amp amps ampere amperes hertz pascal pascals mole moles "
    "ohm ohms farad farads calorie calories byte bytes bit bits"
).split()
# Prefixed symbols that are words of answers, or another thing altogether.
_NEVER = {"am", "pm", "pA", "hA", "cd", "Ts", "hs", "Gs", "Ms"}
SQUARES = ("square", "sq", "squared", "cubic", "cu", "cubed")


def _table() -> dict[str, Unit]:
    table = {name: Unit(name, Fraction(1)) for name in (*_CURRENCIES.split(), *_OTHERS.split())}
    table |= {name: Unit("money", Fraction(1)) for name in _CURRENCIES.split()}
    for dimension, lines in _SCALED.items():
        for entry in lines.split():
            names, factor = entry.split("=")
            table |= {name: Unit(dimension, Fraction(factor)) for name in names.split("|")}
    prefixed = [(prefix, power, name) for prefix, power in _PREFIXES.items() for name in _PREFIXED]
    prefixed += [(prefix, power, name) for prefix, power in _PREFIX_WORDS.items() for name in _PREFIXED_WORDS]
    for prefix, power, name in prefixed:
        if prefix + name not in _NEVER and (base := table.get(name)):
            table.setdefault(prefix + name, Unit(base.dimension, base.factor * Fraction(10) ** power))
    return table


UNITS = _table()


def find_unit(word: str) -> Unit | None:
    """Return the unit that a word names, or None. Symbols keep their case (``mW``, ``MW``); where the lower-case form is
    a unit too, longer ones need not (``Hours``, ``USD``).
    """
    return UNITS.get(word) or (UNITS.get(word.lower()) if len(word) > 1 else None)
