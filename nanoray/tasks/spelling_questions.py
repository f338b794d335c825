"""How people ask to spell a word, or to count a letter in it: {letter} and {word} are filled in."""

from __future__ import annotations

Wording = tuple[str, str]
"""A question, and the mark that ends it where the writer cares for marks."""

SPELL: tuple[Wording, ...] = (
    ("Spell the word {word}", "."),
    ("Spell {word}", "."),
    ("Spell {word} for me", "!"),
    ("Please spell {word}", "."),
    ("Can you spell {word}", "?"),
    ("How is {word} spelled", "?"),
    ("How do you spell {word}", "?"),
    ("Write {word} letter by letter", "."),
    ("Which letters make up {word}", "?"),
    ("Take {word} apart into its letters", "."),
)

COUNT_ENGLISH: tuple[Wording, ...] = (
    ("How many {letter} are in {word}", "?"),
    ("How many {letter} are there in the word {word}", "?"),
    ("How many times does {letter} occur in {word}", "?"),
    ("How often does the letter {letter} show up in {word}", "?"),
    ("How often is {letter} used in {word}", "?"),
    ("How many of the letters in {word} are {letter}", "?"),
    ("How many letters {letter} does {word} have", "?"),
    ("How many times do I write {letter} when I write {word}", "?"),
    ("How many times must I type {letter} to get {word}", "?"),
    ("In the word {word}, how many {letter} do you see", "?"),
    ("In {word}, how often do you find {letter}", "?"),
    ("Take the word {word}: how many {letter} has it got", "?"),
    ("What is the number of {letter} in {word}", "?"),
    ("What number of times is {letter} found in {word}", "?"),
    ("Does {word} have any {letter} in it, and how many", "?"),
    ("Do you know how many {letter} {word} contains", "?"),
    ("Can you count the {letter} in {word}", "?"),
    ("Could you tell me how many {letter} there are in {word}", "?"),
    ("Would you check how often {letter} stands in {word}", "?"),
    ("Count the {letter} in {word}", "."),
    ("Count every {letter} in the word {word}", "."),
    ("Please count how often {letter} is in {word}", "."),
    ("Tell me the count of {letter} in {word}", "."),
    ("Find out how many {letter} the word {word} holds", "."),
    ("Look at {word} and count the letter {letter}", "."),
    ("Go through {word} and say how many {letter} you meet", "."),
    ("I wonder how many {letter} are in {word}", "."),
    ("My little sister asks how many {letter} are in {word}", "."),
    ("For a puzzle I need the number of {letter} in {word}", "."),
    ("Number of {letter} in {word}", "?"),
    ("{word}: how many {letter}", "?"),
    ("Letter {letter}, word {word}, how many", "?"),
)

COUNT_FOREIGN: tuple[Wording, ...] = (
    # Spanish
    ("¿Cuántas {letter} hay en {word}", "?"),
    ("¿Cuántas veces aparece {letter} en la palabra {word}", "?"),
    ("Cuenta las letras {letter} de {word}", "."),
    # French
    ("Combien de {letter} y a-t-il dans {word}", " ?"),
    ("Combien de fois la lettre {letter} est-elle dans le mot {word}", " ?"),
    ("Compte les {letter} du mot {word}", "."),
    # German
    ("Wie viele {letter} hat das Wort {word}", "?"),
    ("Wie oft kommt {letter} in {word} vor", "?"),
    ("Zähle die {letter} in {word}", "."),
    # Italian
    ("Quante {letter} ci sono in {word}", "?"),
    ("Quante volte compare la lettera {letter} nella parola {word}", "?"),
    # Portuguese
    ("Quantas letras {letter} tem a palavra {word}", "?"),
    ("Quantas vezes {letter} aparece em {word}", "?"),
    # Dutch
    ("Hoeveel keer staat {letter} in {word}", "?"),
    # Swedish
    ("Hur många {letter} finns det i ordet {word}", "?"),
    # Polish
    ("Ile liter {letter} jest w słowie {word}", "?"),
    # Russian
    ("Сколько букв {letter} в слове {word}", "?"),
    ("Сколько раз {letter} встречается в {word}", "?"),
    # Turkish
    ("{word} kelimesinde kaç tane {letter} var", "?"),
    # Indonesian
    ("Ada berapa huruf {letter} dalam kata {word}", "?"),
    # Vietnamese
    ("Có bao nhiêu chữ {letter} trong từ {word}", "?"),
    # Chinese
    ("{word} 里有几个 {letter}", "？"),
    ("单词 {word} 中字母 {letter} 出现了多少次", "？"),
    ("请数一数 {word} 里的 {letter}", "。"),
    # Japanese
    ("{word} に {letter} はいくつありますか", "？"),
    ("{word} という単語の中の {letter} を数えてください", "。"),
    # Korean
    ("{word} 에 {letter} 가 몇 개 있나요", "?"),
    ("단어 {word} 에서 {letter} 는 몇 번 나오나요", "?"),
    # Hindi
    ("{word} में {letter} कितनी बार आता है", "?"),
    ("{word} शब्द में कितने {letter} हैं", "?"),
    # Arabic
    ("كم مرة يظهر الحرف {letter} في كلمة {word}", "؟"),
    ("كم حرف {letter} في {word}", "؟"),
)
