"""The phrasings of every question, train and held out, and the lists that fill them; knows no task."""

from __future__ import annotations

from demo.split import Phrasings, listed

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

NAMES = listed(
    "Ada Alma Amir Anna Arlo Bea Ben Boris Carla Chen Clara Dana David Dina Edgar Ella Emil Erik Eva Faye Felix Finn "
    "Flora Frida Georg Gina Hana Hugo Ida Igor Ines Iris Ivan Jana Joel Jonas Julia Kai Karim Kira Lara Lena Leo Lila "
    "Lou Luca Magda Marco Mara Mei Mila Mira Nadia Nico Nina Noor Olga Omar Oscar Otto Paula Pedro Petra Priya Rafi "
    "Rosa Ruth Sami Sara Selma Sven Tara Theo Tina Tom Uma Vera Viktor Wanda Yara Yuki Zara Zoe"
)
ITEMS = listed("apples books buttons cards coins eggs marbles nuts pens shells stamps stones")

ADD = Phrasings(
    train=(
        "{a} + {b}",
        "{a}+{b}",
        "{a} + {b} = ?",
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
        "What's {a} + {b}?",
        "How much is {a} + {b}?",
        "Add {a} and {b}.",
        "Add {b} to {a}.",
        "Calculate {a} + {b}.",
        "Compute {a} plus {b}.",
        "What is the sum of {a} and {b}?",
        "Please add {a} and {b}.",
        "{name} has {a} {item} and gets {b} more. How many are there now?",
        "{name} finds {a} {item} and then {b} more. How many in all?",
    ),
    test=(
        "Could you add {a} and {b} for me?",
        "Give me the sum: {a} + {b}.",
        "There are {a} {item} here and {b} there. How many together?",
    ),
)
SUBTRACT = Phrasings(
    train=(
        "{a} - {b}",
        "{a}-{b}",
        "{a} - {b} = ?",
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
        "What's {a} - {b}?",
        "How much is {a} - {b}?",
        "Subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "Calculate {a} - {b}.",
        "Compute {a} minus {b}.",
        "Please subtract {b} from {a}.",
        "What is left of {a} after taking away {b}?",
    ),
    test=("Could you work out {a} minus {b}?", "Start with {a} and take away {b}.", "Find {a} - {b}."),
)
SUBTRACT_STORY = Phrasings(
    train=(
        "{name} has {a} {item} and gives away {b}. How many are left?",
        "{name} had {a} {item} and lost {b}. How many remain?",
    ),
    test=("Out of {a} {item}, {b} were sold. How many are left?",),
)
MULTIPLY = Phrasings(
    train=(
        "{a} * {b}",
        "{a}*{b}",
        "{a} x {b}",
        "{a} * {b} = ?",
        "What is {a} * {b}?",
        "What is {a} times {b}?",
        "What's {a} times {b}?",
        "How much is {a} times {b}?",
        "Multiply {a} by {b}.",
        "Multiply {a} and {b}.",
        "Calculate {a} * {b}.",
        "Compute {a} times {b}.",
        "What is the product of {a} and {b}?",
        "There are {a} boxes with {b} {item} in each. How many {item} in all?",
    ),
    test=(
        "Could you multiply {a} by {b}?",
        "Give me the product: {a} * {b}.",
        "{name} fills {a} bags with {b} {item} each. How many {item} is that?",
    ),
)
LARGER = Phrasings(
    train=(
        "Which is larger, {a} or {b}?",
        "Which is bigger, {a} or {b}?",
        "Which number is larger: {a} or {b}?",
        "What is the larger of {a} and {b}?",
        "Compare {a} and {b}. Which is more?",
        "Is {a} or {b} the larger number?",
    ),
    test=("Pick the greater of {a} and {b}.", "Between {a} and {b}, which one is larger?"),
)
SMALLER = Phrasings(
    train=(
        "Which is smaller, {a} or {b}?",
        "Which is less, {a} or {b}?",
        "Which number is smaller: {a} or {b}?",
        "What is the smaller of {a} and {b}?",
        "Compare {a} and {b}. Which is less?",
        "Is {a} or {b} the smaller number?",
    ),
    test=("Pick the lesser of {a} and {b}.", "Between {a} and {b}, which one is smaller?"),
)
IS_MORE = Phrasings(
    train=("Is {a} more than {b}?", "Is {a} larger than {b}?", "Is {a} bigger than {b}?", "{a} > {b}?"),
    test=("Would you say that {a} is greater than {b}?",),
)
IS_LESS = Phrasings(
    train=("Is {a} less than {b}?", "Is {a} smaller than {b}?", "Is {a} below {b}?", "{a} < {b}?"),
    test=("Would you say that {a} is lower than {b}?",),
)
SORT_UP = Phrasings(
    train=(
        "Sort {numbers}.",
        "Sort these numbers: {numbers}.",
        "Sort from small to large: {numbers}.",
        "Put these in order: {numbers}.",
        "Order these numbers: {numbers}.",
        "Sort the list {numbers}.",
        "Arrange {numbers} from smallest to largest.",
        "Please sort {numbers}.",
        "Sort {numbers} in increasing order.",
        "What is the right order of {numbers}?",
    ),
    test=("Line up {numbers}, smallest first.", "Could you sort {numbers} for me?"),
)
SORT_DOWN = Phrasings(
    train=(
        "Sort {numbers}, largest first.",
        "Sort from large to small: {numbers}.",
        "Sort {numbers} in decreasing order.",
        "Arrange {numbers} from largest to smallest.",
    ),
    test=("Line up {numbers}, largest first.",),
)
REVERSE = Phrasings(
    train=(
        "Reverse {word}.",
        "Reverse the word {word}.",
        "Spell {word} backwards.",
        "Write {word} backwards.",
        "Write the word {word} backwards.",
        "What is {word} backwards?",
        "What is {word} reversed?",
        "What is the reverse of {word}?",
        "Turn the word {word} around.",
        "Say {word} in reverse.",
        "Please reverse {word}.",
        "Give me {word} backwards.",
    ),
    test=("Can you flip the word {word}?", "Read {word} from the end.", "How does {word} look backwards?"),
)
SPELL = Phrasings(
    train=(
        "Spell {word}.",
        "Spell the word {word}.",
        "How do you spell {word}?",
        "How is {word} spelled?",
        "What are the letters of {word}?",
        "List the letters of {word}.",
        "Please spell {word}.",
        "Spell out {word}.",
        "Spell {word} for me.",
        "Which letters are in {word}?",
        "Write {word} letter by letter.",
        "Give me the letters of {word}.",
    ),
    test=("Can you spell {word}?", "Split {word} into letters.", "Name each letter of {word}."),
)
COUNT = Phrasings(
    train=(
        'How many times does "{letter}" appear in {word}?',
        'How many "{letter}" are in {word}?',
        "How many {letter}'s are in {word}?",
        "How many {letter}'s are there in the word {word}?",
        "How often does the letter {letter} occur in {word}?",
        "Count the letter {letter} in {word}.",
        "Count the {letter}'s in {word}.",
        'Count "{letter}" in {word}.',
        "How many times is the letter {letter} in the word {word}?",
        'How often is "{letter}" in {word}?',
        'In {word}, how many "{letter}" are there?',
        "Please count the letter {letter} in {word}.",
        "Tell me how often the letter {letter} is in {word}.",
    ),
    test=("Find the number of {letter}'s in {word}.", 'How often do you see "{letter}" in {word}?'),
)
LENGTH = Phrasings(
    train=(
        "How long is {word}?",
        "How long is the word {word}?",
        "How many letters are in {word}?",
        "How many letters does {word} have?",
        "Count the letters of {word}.",
        "What is the length of {word}?",
        "How many letters are there in the word {word}?",
        "Please count the letters in {word}.",
    ),
    test=("Find the length of {word}.", "Of how many letters is {word} made?"),
)
DAY_AFTER = Phrasings(
    train=(
        "What day is {n} {days} after {day}?",
        "Which day is {n} {days} after {day}?",
        "Today is {day}. What day is it in {n} {days}?",
        "If today is {day}, what day will it be in {n} {days}?",
        "It is {day}. Which day comes {n} {days} later?",
        "What weekday is {n} {days} after {day}?",
        "What is {day} plus {n} {days}?",
    ),
    test=("Count {n} {days} forward from {day}.", "Starting on {day}, what day is it {n} {days} on?"),
)
DAY_BEFORE = Phrasings(
    train=(
        "What day is {n} {days} before {day}?",
        "Which day is {n} {days} before {day}?",
        "Today is {day}. What day was it {n} {days} ago?",
        "If today is {day}, what day was it {n} {days} ago?",
        "It is {day}. Which day was {n} {days} earlier?",
        "What weekday is {n} {days} before {day}?",
        "What is {day} minus {n} {days}?",
    ),
    test=("Count {n} {days} back from {day}.", "Starting on {day}, what day is it {n} {days} back?"),
)
MONTH_AFTER = Phrasings(
    train=(
        "What month is {n} {months} after {month}?",
        "Which month is {n} {months} after {month}?",
        "It is {month}. What month is it in {n} {months}?",
        "What month comes {n} {months} after {month}?",
    ),
    test=("Count {n} {months} forward from {month}.",),
)
MONTH_BEFORE = Phrasings(
    train=(
        "What month is {n} {months} before {month}?",
        "Which month is {n} {months} before {month}?",
        "It is {month}. What month was it {n} {months} ago?",
        "What month comes {n} {months} before {month}?",
    ),
    test=("Count {n} {months} back from {month}.",),
)
NEXT_MONTH = Phrasings(
    train=("What month comes after {month}?", "Which month follows {month}?", "What is the month after {month}?"),
    test=("Name the month that comes after {month}.",),
)
PREVIOUS_MONTH = Phrasings(
    train=("What month comes before {month}?", "Which month precedes {month}?", "What is the month before {month}?"),
    test=("Name the month that comes before {month}.",),
)
MONTH_LENGTH = Phrasings(
    train=(
        "How many days does {month} have?",
        "How many days are in {month}?",
        "How long is {month} in days?",
        "What is the number of days in {month}?",
    ),
    test=("Count the days of {month}.",),
)
TWO_MONTHS_LENGTH = Phrasings(
    train=(
        "How many days do {month} and {other} have together?",
        "How many days are in {month} and {other}?",
        "What is the total number of days in {month} and {other}?",
    ),
    test=("Count the days of {month} and {other} together.",),
)
DAY_OF_YEAR = Phrasings(
    train=(
        "What day of the year is {month} {n}?",
        "Which day of the year is {month} {n}?",
        "What number in the year does {month} {n} have?",
        "How many days into the year is {month} {n}?",
    ),
    test=("Find the day of the year for {month} {n}.",),
)
DATE_AFTER = Phrasings(
    train=(
        "What date is {n} {days} after {month} {start}?",
        "Which date is {n} {days} after {month} {start}?",
        "Today is {month} {start}. What is the date in {n} {days}?",
        "It is {month} {start}. What date will it be in {n} {days}?",
    ),
    test=("Count {n} {days} forward from {month} {start}.",),
)
