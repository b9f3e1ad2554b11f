"""English numerals, as prompts count clusters."""
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen").split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_word(n):
    """English words of an integer: 17 -> "seventeen", 342 -> "three hundred and forty-two".

    Raises: ValueError outside 0 to 999.
    """
    if not 0 <= n <= 999:
        raise ValueError(f"got number {n}, prompts count from 0 to 999: use fewer clusters")
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {number_word(n % 100)}" if n % 100 else "")
