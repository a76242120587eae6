"""How an answer stands to the truth, in English: it hedges, it refuses, it names the text that it draws on.

The report adds subsets of data that encourage "better in-context attribution, hedging, and refusals", and
finds better factuality for it (arXiv 2408.00118, section 5). How they were found or made it does not say.
Here an answer is marked by its words, so that such subsets can be counted and weighted. No mark drops
anything.

The patterns are few and sure rather than complete: "I cannot help you with that" is a refusal, "I cannot help
laughing" is none. What stands in quotation marks or in code is said by somebody else, and does not count.
"""

import re

TAGS = ("hedging", "refusal", "attribution")
"""In the order in which `tags_of` gives them."""

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_QUOTED = re.compile(r"[\"“]([^\"“”\n]+)[\"”]|`([^`\n]+)`")
_LEAST_WORDS = 4  # of a quotation: three words of a question stand in many an answer by chance
_WORD = re.compile(r"\w+")

_I_AM = r"\bI(?:['’]m| am)"
_HEDGES = (
    rf"{_I_AM} (?:not|by no means) (?:(?:entirely|completely|quite|absolutely|fully|really|100 ?%|so|too) )?"
    r"(?:sure|certain|confident)\b",
    rf"{_I_AM} (?:a bit |somewhat |rather )?(?:unsure|uncertain)\b",
    r"\bI (?:may|might|could) (?:well )?be (?:wrong|mistaken|misremembering)\b",
    r"\bif I (?:remember|recall|understand)(?: it| this)? (?:correctly|rightly|right)\b",
    r"\b(?:as far as I (?:know|can tell|remember|recall)|to the best of my knowledge)\b",
    r"\b(?:I (?:would|['’]d) guess|I suspect|my (?:best )?guess is)\b",
    r"\b(?:probably|presumably)\b",
    r"\b(?<!you )(?:perhaps|possibly|maybe)\b(?! the (?:most|best)\b)",
    r"\b(?:is|are|was|were|it|will|would|has|have) (?:most |very |quite |more )?likely\b(?! as\b)",
    r"\b(?:it|this|that|they|he|she|there) (?:may|might) (?:well |also )?(?!not\b)"
    r"(?!be (?:used|called|written|given|omitted|passed|repeated|any|no more)\b)(?:be|have|depend|mean|do)\b",
    r"\bit(?:['’]s| is) (?:un|not (?:entirely |quite )?)clear (?:whether|if|what|who|how|why)\b",
    r"\b(?:hard|difficult|impossible) to (?:say|know|tell) (?:for (?:sure|certain)|exactly|with certainty)\b",
)
_CANNOT = rf"(?:\bI (?:can(?:['’]t|not| not)|won['’]t|will not)|{_I_AM} (?:not able|unable) to)"
_REFUSALS = (
    rf"{_CANNOT} (?:help|assist)(?: you)?(?: (?:with|you|in|to)\b|[.,;!]|$)",
    rf"{_CANNOT} (?:provide|give|share|answer|comply|fulfil+|discuss|disclose|reveal|confirm|determine"
    r"|verify)\b(?! (?:up|in|enough)\b)",
    rf"{_CANNOT} (?:write|create|generate|produce|do|engage in|support|participate in|access|open|browse) "
    r"(?:that|this|it|such|any|content|the (?:file|link|internet|web|page|image))\b",
    rf"{_CANNOT} (?:tell|say|know)(?! (?:you )?(?:how (?:much|happy|glad|grateful|sorry)|enough)\b)"
    r"(?: you)?(?: (?:that|this|who|what|whether|if|when|where|which|how|why|from|for|with)\b|[.,;!]|$)",
    r"\bI (?:do not|don['’]t) (?:really |actually )?know(?! (?:about you|how to thank)\b)"
    r"(?: (?:the|that|this|what|who|whom|whose|which|when|where|whether|if|how|why|of|enough)\b|[.,;!]|$)",
    r"\bI (?:do not|don['’]t) have (?:any |enough |sufficient |direct )?"
    r"(?:information|access|knowledge|data|details)\b",
    r"\bI (?:must|have to|need to|will have to|respectfully) (?:decline|refuse)\b",
    r"\b(?:I(?:['’]d| would) rather not|I(?:['’]m| am) not going to) "
    r"(?:help|answer|say|write|provide|give|discuss|share|do (?:that|this))\b",
    r"\bI(?:['’]m| am) (?:so |very |really )?(?:sorry|afraid),? (?:but )?I (?:can(?:['’]t|not)|won['’]t)\b",
    r"\bthe (?:text|passage|article|document|signature|context|excerpt|paragraph) (?:does not|doesn['’]t) "
    r"(?:say|mention|state|tell|specify)\b",
)
_TEXT = (
    r"(?:(?:given|following|provided|function['’]?s?|class['’]?s?|method['’]?s?|whole|first|second|last) )?"
    r"(?:text|passage|code|snippet|excerpt|paragraph|sentence|article|document|docstring|signature|header"
    r"|definition|description|context|table|list|message|e-?mail|letter|story|poem|transcript|comment)s?"
)
_SAYS = r"(?:says?|states?|shows?|tells?|suggests?|indicates?|mentions?|explains?|describes?|reads?|puts? it)"
_ATTRIBUTIONS = (
    rf"\b(?:according to|based on|judging (?:by|from)|going by|as per) (?:the|your|its|this|that) {_TEXT}\b",
    rf"\bas (?:is )?(?:stated|shown|written|described|mentioned|given|seen|noted|explained) (?:in|by) "
    rf"(?:the|your|its|this) {_TEXT}\b",
    rf"\b(?:as|since|because) (?:the|your|its|this) {_TEXT} (?:itself )?(?:above )?(?:also )?{_SAYS}\b",
    rf"\b(?:the|your|its|this) {_TEXT}(?: above)? (?:itself |also |clearly )?{_SAYS} (?:that|so)\b",
    rf"\b(?:from|in) the {_TEXT} (?:above|you (?:gave|provided|shared|quoted|posted))\b",
    r"\b(?:since|because|as) (?:its|the) (?:only |first |second |third |last )"
    r"(?:parameter|argument|line|word|sentence|row|column|statement) (?:is|says|reads|has)\b",
    r"\b(?:judging )?by its name, ",
)


def _any(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE | re.MULTILINE)


_HEDGE, _REFUSAL, _ATTRIBUTION = map(_any, (_HEDGES, _REFUSALS, _ATTRIBUTIONS))


def tags_of(answer: str, context: str) -> tuple[str, ...]:
    """Which of `TAGS` an answer has.

    Args:
        context: what the user said up to then. A quotation of four words or more from it is attribution too.
    """
    code_free = _CODE.sub(" ", answer)
    own = _QUOTED.sub(" ", code_free)
    found = {
        "hedging": _HEDGE.search(own) is not None,
        "refusal": _REFUSAL.search(own) is not None,
        "attribution": _ATTRIBUTION.search(own) is not None or _quotes(answer, context),
    }
    return tuple(tag for tag in TAGS if found[tag])


def _quotes(answer: str, context: str) -> bool:
    """Whether something of enough words stands in quotation marks or as code, and in the context as well."""
    known = f" {' '.join(_WORD.findall(context.casefold()))} "
    for match in _QUOTED.finditer(answer):
        words = _WORD.findall((match[1] or match[2]).casefold())
        if len(words) >= _LEAST_WORDS and f" {' '.join(words)} " in known:
            return True
    return False
