"""The grammars of the base's prose: what its small world talks about."""

from __future__ import annotations

from collections.abc import Mapping

from grammar import Rules

WEATHER: Rules = {
    "text": (
        "Weather for {made_up:place}, {day}: {sky} in the morning, {sky} later. Wind from the {quarter}, {few} to {tens} km "
        "per hour. {advice}",
        "{day} in {made_up:place} will be {sky}. The temperature reaches {number} degrees by {clock}, and {made_up:place} "
        "will feel {feel}. {advice}",
        "A {feel} {day}: {sky} over {made_up:place} and {sky} over {made_up}. Around {clock} the wind turns to the {quarter}. {advice}",
    ),
    "sky": ("sunny", "cloudy", "light rain", "heavy rain", "fog near the river", "snow on the hills", "clear and dry", "a few showers"),
    "quarter": ("north", "south", "east", "west"),
    "feel": ("warm", "cold", "mild", "windy", "wet", "grey"),
    "advice": (
        "Take an umbrella.", "A coat is enough.", "Stay at home if you can.",
        "Good weather for a walk.", "Roads in {made_up:place} may be icy.",
    ),
}
RECIPES: Rules = {
    "text": (
        "{made_up:dish} {kind}. You need {number} g of {food:a}, {few} spoons of {food:b} and some {food:c}. "
        "First chop the {food:a}. {step} Add the {food:b} and the {food:c}. {step} Serve the {made_up:dish} {kind} {serve}.",
        "How to make a {kind:k} for {few} people: mix {food:a} with {food:b}. {step} Leave the {kind:k} for {tens} minutes. "
        "{step} Serve {serve}.",
    ),
    "kind": ("soup", "pie", "stew", "salad", "cake", "bread"),
    "food": (
        "flour", "butter", "carrots", "onions", "milk", "rice", "apples",
        "beans", "cheese", "honey", "tomatoes", "potatoes", "salt", "lemon",
    ),
    "step": ("Stir well.", "Cook it for {tens} minutes.", "Bake until brown.", "Let it cool.", "Keep the heat low."),
    "serve": ("warm", "cold", "with {food}", "with fresh bread", "at once"),
}
NOTICES: Rules = {
    "text": (
        "{shop:s} opens at {clock} and closes at {clock}. This {day} every {thing:t} costs {number} coins. Ask {person:p} for "
        "the {thing:t}. {end}",
        "Notice: {shop:s} is closed on {day} because {reason}. Your {thing} can be collected from {person:p}. Please ring "
        "{person:p} first. {end}",
        "New at {shop:s}: the {thing:t}, made by {person:p}. Buy {few} and pay for one. {end}",
    ),
    "shop": ("The {made_up} shop", "{made_up} and Sons", "The bakery of {made_up}", "The {noun} shop"),
    "reason": ("we are moving", "of the holiday", "the roof is being mended", "{person} is getting married"),
    "end": ("Thank you!", "Everybody is welcome.", "No dogs, please.", "We look forward to seeing you."),
}
TRAVEL: Rules = {
    "text": (
        "We left {made_up:a} at {clock} and came to {made_up:b} {late}. {made_up:b} has {sight} and {sight}. "
        "{person:p} met us there and {did}. {mood} On {day} we go back to {made_up:a}.",
        "From {made_up:a} to {made_up:b} it is {number} miles by {means}. In {made_up:b} we saw {sight}. {person:p} came too. "
        "{mood} {person:p} {did}.",
    ),
    "late": ("in the evening", "two hours late", "before noon", "in the rain"),
    "sight": ("an old bridge", "a market with fruit", "a tower on a hill", "a {adjective} square", "a museum of {noun}s", "a long beach"),
    "did": ("showed us the town", "lost the map", "bought a {thing}", "sang all the way", "took the bags"),
    "mood": ("We were tired but happy.", "It was too hot.", "Nobody wanted to leave.", "The food was good."),
    "means": ("train", "boat", "bus", "bicycle"),
}
APPOINTMENTS: Rules = {
    "text": (
        "Appointment: {person:p} on {day:d} at {clock:t}. Please bring {item}. If you cannot come on {day:d}, tell {person:q} "
        "before {clock}.",
        "{person:p} is expected on {day:d} at {clock:t} for {why}. {person:q} will be there at {clock:t}. {person:p} should bring {item}.",
        "Dear {person:p}, please come and see Dr {made_up:q} in room {number} on {day:d}. Dr {made_up:q} {waits}.",
        "Tell {person:p} to collect the medicine: {few} tablets in the {part}, {how}. Ready on {day:d}; so says Dr {made_up:q}.",
        "Note for {person:p}: your visit for {why:w} is moved to {day:d}, {clock:t}. {person:q} has time for {why:w} then.",
    ),
    "waits": ("has time at {clock}", "is on the {ordinal} floor", "will not be there before {clock}"),
    "ordinal": ("first", "second", "third", "fifth", "ground"),
    "part": ("morning", "evening"),
    "how": ("with water", "with food", "before sleep", "never with milk"),
    "why": ("a check", "new glasses", "a talk", "a lesson", "the papers", "a haircut"),
    "item": ("your card", "the letter", "a pen", "the old {noun}", "nothing"),
}
STORIES: Rules = {
    "text": (
        "Once there was a {who:w} called {made_up:n} who had a {thing:t}. {made_up:n} {wish}. One day {person:p} came and "
        "took the {thing:t}. "
        "The {who:w} was {sad}. \"{ask}\" said {made_up:n}. {person:p} {reply}, and {made_up:n} got the {thing:t} back. {end}",
        "{person:p} and {person:q} found a {thing:t} by the {noun:o}. \"It is mine,\" said {person:p}. "
        "\"No, it is mine,\" said {person:q}. "
        "Then a {who:w} came out of the {noun:o} and said: \"{ask}\" So they shared the {thing:t}. {end}",
    ),
    "who": ("fox", "girl", "boy", "bear", "farmer", "mouse", "sailor", "queen"),
    "wish": ("loved it very much", "wanted to sell it", "kept it under the bed", "played with it every {day}"),
    "sad": ("very sad", "angry", "surprised", "ill for {few} days"),
    "ask": ("Why did you do that?", "Please give it back.", "Can we be friends?", "Who is the owner?"),
    "reply": ("smiled", "said sorry", "felt ashamed", "laughed"),
    "end": ("They were friends from then on.", "And that was that.", "Then everybody went home.", "The end."),
}
QUESTIONS: Rules = {
    "text": (
        "user: {made_up:a} has {few} {noun:n}s and {made_up:b} has {number:k} {noun:n}s. How many {noun:n}s has "
        "{made_up:b}?\nassistant: {number:k} {noun:n}s.",
        "user: {person:p} lives in {made_up:a}. Where does {person:p} live?\nassistant: In {made_up:a}.",
        "user: {person:p} gave the {thing:t} to {person:q}. Who has the {thing:t}?\nassistant: {person:q} has it.",
        "Question: {person:p} meets {person:q} on {day:d} at {clock:t}. When do they meet? Answer: {day:d} at {clock:t}.",
        "user: Say {made_up:a}, then {made_up:b}, then {noun:n}.\nassistant: {made_up:a}, {made_up:b}, {noun:n}.",
    ),
}
PROSE: Mapping[str, Rules] = {
    "weather": WEATHER,
    "recipes": RECIPES,
    "notices": NOTICES,
    "travel": TRAVEL,
    "appointments": APPOINTMENTS,
    "stories": STORIES,
    "questions": QUESTIONS,
}
