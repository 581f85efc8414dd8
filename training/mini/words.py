"""English that prompts are made of beyond the captions of the world: words that become one token each.

No model of the pack was taught what they mean; they only keep a free prompt, or the name of a LoRA's person, short. Appending is
safe, reordering is not: a word's place decides its token id, and trained embeddings depend on it.
"""

from __future__ import annotations

from typing import Final

_GRAMMAR = """
the and or but not no nor so than then that this these those there here it its is are was were be been being am do does did doing has have
had having will would can could shall should may might must i you he she we they me him her us them my your his our their mine yours
who whom whose which what when where why how all any both each few more most other some such only own same too very just also as at
by for from in into of off on onto out over to up down with without within about above across after against along among around before
behind below beneath beside besides between beyond during except inside like near outside past since through toward towards under until
upon while one two three four five six seven eight nine ten first second third next last another every many much several
"""
_PEOPLE = """
man woman boy girl child kid baby adult lady gentleman guy people friend friends family mother father brother sister couple group human
king queen prince princess knight wizard witch warrior hero villain doctor nurse teacher student worker farmer chef artist singer dancer
soldier officer pilot astronaut scientist engineer lawyer athlete model actor actress businessman businesswoman old young elderly
middle aged teenage senior tall short slim strong beard bearded moustache mustache bald hair haired hairstyle blonde blond brunette
ginger curly straight wavy long ponytail braid braids bun bangs freckles glasses sunglasses eye eyes eyebrow eyebrows nose mouth lips
teeth ear ears earring earrings necklace face facial skin neck head shoulder shoulders arm hand finger leg legs foot feet body chest
"""
_LOOKS = """
smile smiles laugh cry crying angry mad scared afraid tired sleepy bored excited proud shy confident gentle elegant handsome pretty cute
gorgeous lovely cool funny silly wise evil expression emotion emotional mood grin frown wink looking staring standing sitting walking
running jumping dancing holding reading writing eating drinking cooking playing singing sleeping working waving pointing posing leaning
riding driving fighting flying swimming shirt blouse dress skirt coat jacket jeans trousers pants shorts shoes boots sneakers hat cap
scarf gloves belt uniform armor armour robe cape vest cardigan sweatshirt outfit clothes clothing costume fashion leather denim wool
silk cotton plaid checkered dotted pattern plain dark light pale deep pink brown grey gray gold golden silver cyan magenta teal navy
beige cream turquoise colored coloured colour color colors
"""
_PLACES = """
house home room bedroom kitchen bathroom living hall door window wall floor roof stairs garden yard street road bridge car bus train
station airport plane boat ship shop store market mall restaurant bar hotel hospital school classroom university museum gallery
theater theatre cinema church temple castle palace tower building skyscraper village town farm field meadow hill valley river lake
waterfall ocean island shore sand wave waves cliff cave jungle rainforest grass flower flowers rose leaf leaves bush wood rock rocks
stone mountain sky cloud clouds cloudy sun sunny sunrise moon star stars space planet rain rainy storm stormy wind windy fog foggy mist
snowy ice winter spring summer autumn fall day morning noon afternoon evening night midnight dawn dusk indoors outdoors background
foreground table chair desk bed sofa couch lamp book phone computer laptop cup glass bottle food bread cake fruit apple coffee tea
water wine beer dog cat horse bird fish animal bear wolf lion tiger fox rabbit dragon robot monster ghost
"""
_PICTURES = """
image photograph photography photographer drawing painting sketch cartoon anime comic poster logo icon art artwork artistic style styled
vector render rendering realistic realism photorealistic cinematic film movie vintage retro modern futuristic fantasy abstract minimal
minimalist simple complex intricate professional amateur masterpiece best quality good bad worst low ultra hd resolution hdr sharp
blurry blurred soft focus bokeh depth lens camera shot angle view front rear profile wide close macro aerial top bottom left right
center centre middle half full upper lower side length lighting lit shadow shadows bright brightness contrast vivid vibrant saturated
muted monochrome black white neon glowing glow shiny matte smooth rough texture textured clean dirty wet dry hot cold warm new huge big
large small tiny little great nice amazing awesome epic dramatic mysterious romantic peaceful quiet busy crowded empty lonely magic
magical famous rich poor free wearing dressed showing made using based text watermark signature ugly deformed extra missing limbs hands
"""
_TRIGGERS = "ohwx sks tok zwx"

COMMON_WORDS: Final = tuple(dict.fromkeys(" ".join((_GRAMMAR, _PEOPLE, _LOOKS, _PLACES, _PICTURES, _TRIGGERS)).split()))
"""In the order of their ids, each once."""

WORD_ENDINGS: Final = tuple("s es ed d er ers est ing ly y al ful less ness ment tion able 's n't".split())
"""Pieces that may follow a word (only T5's tokeniser is told of them; CLIP's merges find their own)."""
