# ruff: noqa: SIM905
"""The words of the corpus. Things that facts speak of (MATERIALS, OBJECTS, LAST_NAMES, ...) never stand in filler.

Every word is meant to become one token of the bundled tokenizer.
"""

from collections.abc import Sequence

__all__ = [
    "COLOURS",
    "CONTAINERS",
    "DAYS",
    "FILLER",
    "FIRST_NAMES",
    "GOODS",
    "LAST_NAMES",
    "MATERIALS",
    "MONTHS",
    "OBJECTS",
    "PORTS",
    "SHIPS",
    "SLOTS",
]

MATERIALS = (
    "brass iron copper silver golden wooden ivory marble pewter bronze leather velvet crystal amber pearl coral "
    "painted carved broken polished folded sealed hidden ancient tiny curved striped spotted gilded rusty"
).split()
COLOURS = "red blue green yellow black white purple orange crimson scarlet violet indigo".split()
OBJECTS = (
    "key lantern compass mirror bell flute medal ring whistle knife spoon goblet statue clock ledger chart letter "
    "globe telescope pistol anchor button candle brooch thimble hourglass necklace puzzle harp drum violin mask "
    "crown dagger needle buckle bracelet basket ribbon inkwell sextant locket"
).split()
GOODS = "rope canvas tar nails flour sugar coffee tobacco cotton wool paper wax oil salt pepper soap".split()
CONTAINERS = "locker crate drawer chest box cabinet".split()
FIRST_NAMES = (
    "Mara Edda Tomas Clara Ruben Ingrid Pavel Nora Silas Greta Oscar Lydia Felix Hanna Jonas Vera Anton Celia Hugo "
    "Rosa Emil Dora Victor Selma Casper Thea Ivo Marta Leon Alma"
).split()
LAST_NAMES = (
    "Voss Holm Lindt Brandt Farrow Quill Ashby Marsh Thorne Keller Draper Locke Sorensen Vance Pike Harlow Stroud "
    "Winter Calder Moss Barlow Finch Graves Hobbs Lang Mercer Nash Orton Reed Sutter"
).split()
PORTS = (
    "Ansel Bremmer Carrow Dunmore Elsin Farhaven Galder Hexham Islay Jarrow Kelm Lorne Merrow Norvik Orsay Penrith "
    "Quayle Rostow Selby Tarn Ulster Varna Wexford Yarrow"
).split()
SHIPS = "Heron Petrel Albatross Kestrel Marlin Tern Osprey Curlew".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

SLOTS: dict[str, Sequence[str]] = {
    "first": FIRST_NAMES,
    "ship": SHIPS,
    "hour": [str(hour) for hour in range(1, 13)],
    "few": "two three four five six seven eight nine ten twelve".split(),
    "wind": "breeze gale wind squall storm".split(),
    "direction": "north south east west northeast northwest southeast southwest".split(),
    "sky": "clear grey cloudy dark bright pale stormy hazy".split(),
    "sea": "calm rough smooth heavy choppy restless gentle".split(),
    "meal": "bread soup stew fish cheese porridge rice beans apples biscuits potatoes onions mutton pudding".split(),
    "drink": "tea water cider milk broth".split(),
    "mood": (
        "tired cheerful quiet hungry anxious hopeful proud restless content homesick grateful nervous lonely patient"
    ).split(),
    "task": [
        "mending the sails",
        "scrubbing the deck",
        "splicing the lines",
        "pumping the bilge",
        "sorting the mail",
        "counting the barrels",
        "airing the blankets",
        "tarring the hull",
        "sharpening the tools",
        "writing to the family",
    ],
    "room": "galley cabin hold forecastle pantry workshop wheelhouse kitchen attic cellar".split(),
    "animal": "gulls dolphins whales seals pelicans porpoises geese cats".split(),
    "song": "ballad shanty hymn waltz lullaby tune".split(),
    "time": [
        "at dawn",
        "at noon",
        "at dusk",
        "at midnight",
        "before breakfast",
        "after supper",
        "in the morning",
        "in the evening",
        "during the watch",
        "all day",
    ],
    "part": "mast rudder bow stern keel railing pump windlass hatch bowsprit".split(),
    "fault": "leaking creaking loose cracked damp worn frozen stuck".split(),
}

FILLER: dict[str, Sequence[str]] = {
    "log": [
        "The {wind} came from the {direction} {time}.",
        "The sky was {sky} and the sea was {sea}.",
        "We sailed {direction} under a {sky} sky.",
        "{first} stood at the wheel {time}.",
        "{first} saw {few} {animal} off the bow.",
        "The crew spent the day {task}.",
        "A {wind} from the {direction} kept us below {time}.",
        "The {part} was {fault}, so {first} repaired it {time}.",
        "We ate {meal} and {meal} {time}.",
        "{first} and {first} took the watch {time}.",
        "The water in the {room} rose a little {time}.",
        "Nothing happened {time}.",
        "We passed the {ship} {time} and waved to her crew.",
        "The cook served {meal} with {drink}.",
        "The men were {mood} but worked well.",
        "Land was seen to the {direction} {time}.",
        "{first} sang a {song} while {task}.",
        "Rain fell {time}.",
        "The sea stayed {sea}.",
        "The captain ordered all hands to rest.",
        "We lowered the boat and rowed {direction} for {few} hours.",
        "The glass fell and the {wind} grew stronger.",
        "Fog hid the coast {time}, and we rang for the {ship}.",
        "{first} reported that the {part} is {fault} again.",
        "We landed on a {sky} beach and filled every barrel with {drink}.",
        "{first} caught {few} fish {time} and shared them with the others.",
        "The current carried us {direction} faster than anyone expected.",
        "Lightning struck close to the {part}, yet nobody was hurt.",
        "Our speed dropped to {few} knots {time}.",
        "{first} climbed up to look for the {ship} but saw only {animal}.",
        "The stars were visible {time}, and {first} practised navigation.",
        "A stranger on the {ship} shouted something we could not understand.",
        "Waves broke over the {part} until the {wind} finally eased.",
        "An albatross followed us for {few} hundred miles.",
        "{first} steered between two dangerous reefs {time}.",
        "The carpenter promised to finish {task} before Sunday.",
    ],
    "inventory": [
        "{first} checked the {room} {time}.",
        "The {room} is clean and dry.",
        "{few} barrels of {drink} are left in the {room}.",
        "{first} counted {few} sacks of {meal}.",
        "No {meal} was found in the {room}.",
        "The door of the {room} is {fault}.",
        "{first} signed for {few} bags of {meal} {time}.",
        "The shelves in the {room} were moved {time}.",
        "{few} sacks came aboard from the {ship}.",
        "The {part} is {fault} and must be replaced.",
        "{first} swept the {room} and opened the window.",
        "Rats were heard in the {room} {time}.",
        "The list was read aloud {time}.",
        "All labels in the {room} are new.",
        "{first} asked {first} to count the {meal} again.",
        "The {drink} is fresh.",
        "Delivery from the {ship} is late.",
        "{few} empty barrels went back to the {ship} {time}.",
        "Nothing is missing.",
        "The crew helped with {task}.",
        "A cracked jar of {meal} was thrown overboard {time}.",
        "{first} borrowed the keys of the {room} and returned them {time}.",
        "Dust covers the upper shelves of the {room}.",
        "The price of {meal} has doubled since last month.",
        "Everything else in the {room} agrees with the previous list.",
        "{first} found a hole behind the {room} wall and closed it.",
        "Customs officers inspected the {room} {time} without complaint.",
        "The scales in the {room} are accurate again.",
        "{few} bundles arrived wet because the {part} was {fault}.",
        "Tools lent to the {ship} have not been returned.",
        "Damaged goods were sold cheaply at auction.",
        "A receipt for the {meal} is pinned to the {room} door.",
    ],
    "diary": [
        "I woke {time} and felt {mood}.",
        "{first} came to see me {time}.",
        "We drank {drink} and talked about the weather.",
        "I walked {direction} along the shore with {first}.",
        "{first} was {mood}, and so was I.",
        "My sister sent {few} postcards about {meal}.",
        "I heard {animal} outside the {room} {time}.",
        "It rained {time}.",
        "{first} played a {song} for us {time}.",
        "I had {meal} with {first} in the {room}.",
        "The evening was {sky} and quiet.",
        "I dreamed of {animal} again.",
        "{first} laughed and told a story about the {ship}.",
        "I spent the morning {task}.",
        "The house smelled of {meal} and {drink}.",
        "I feel {mood} tonight.",
        "{first} and {first} argued about the {song} {time}.",
        "I forgot to close the {room} window.",
        "There was a {wind} from the {direction}, so we stayed in the {room}.",
        "Tomorrow I will visit {first}.",
        "I slept badly.",
        "We watched {few} {animal} near the water {time}.",
        "My mother always said that a {sky} morning brings luck.",
        "{first} taught me a difficult {song} on the old piano.",
        "I read a novel about {animal} by the fire {time}.",
        "Nobody believed me when I described the {animal}.",
        "Perhaps {first} is right, and I worry too much.",
        "The neighbours celebrated {time} with {meal} and music.",
        "I bought {few} oranges at the market and gave one to {first}.",
        "My shoes are still wet from yesterday.",
        "{first} wore a beautiful coat and looked rather {mood}.",
        "The doctor recommends fresh air and long walks.",
        "Grandfather showed {first} how to repair the {part}.",
        "Children were playing beside the {room} {time}.",
    ],
}
