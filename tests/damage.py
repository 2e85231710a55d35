"""JSON that is damaged anyhow, as by a bad disk or by whoever means harm."""

ODD = [None, True, 0, -1, 2**63, 10**40, 1.5, "", "x" * 5000, "../x", "/etc/passwd", "\ud800", [], {}, [1, 2], {"a": 1}, [[[]]]]


def places_in(value, place=()):
    """Every place in a JSON value but the whole, as keys and indices."""
    if place:
        yield place
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places_in(value[key], (*place, key))


def change(data, random):
    """One place becomes another value, has another name, is there twice or not at all."""
    *above, last = random.choice(list(places_in(data)))
    around = data
    for key in above:
        around = around[key]
    kind, old = random.random(), around[last]
    if kind < 0.6 or (kind < 0.75 and (isinstance(old, bool) or not isinstance(old, int | float))):
        around[last] = random.choice(ODD)
    elif kind < 0.75:
        around[last] = random.choice([old + 1, old * 2, -old, old + 0.5])
    elif kind < 0.85:
        del around[last]
    elif isinstance(around, dict):
        around[random.choice(["x" * 5000, "new", "../x", "\ud800"])] = around.pop(last)
    else:
        around.append(old)
