//! A text adventure: rooms, keys, locked doors, containers, and a treasure to take.
//!
//! The player writes a command on the last line of a turn: `go north`, `take the red key`, `open the chest`,
//! `unlock the east door`, `look`; the adventures' abbreviations `n e s w t o u l` do as well. A turn pays for the progress it
//! makes: with distance `d` to the goal in moves, found by search over the game's states,
//!
//! ```text
//! reward = progress · (d_before - d_after) / d_start + (1 - progress) · [the treasure was taken]
//! ```
//!
//! Progress is a potential (Ng, Harada and Russell, "Policy invariance under reward transformations", ICML 1999): detours
//! give back what they earned, so that every game won pays 1 and the shortest way stays the best.

mod map;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Environment, EnvironmentError, EpisodeId, Transition};
use crate::score::Status;
use crate::tasks::{Draws, Problem, candidates, has_both_splits, split_of};
use map::{Direction, Map, Move, State};

/// Options of the `text_game` environment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TextGameOptions {
    /// Fewest and most rooms.
    pub rooms: [usize; 2],
    /// Most locked doors; each has its key. Never more than rooms less one, nor than 4.
    #[schemars(range(max = 4))]
    pub doors: usize,
    /// Share of the things that lie in closed containers.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub contained: f64,
    /// Turns until a game is lost.
    #[schemars(range(min = 1, max = 1000))]
    pub max_turns: usize,
    /// Share of the reward that is paid for progress, turn by turn; the rest is paid for the treasure.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub progress: f64,
    /// How much is said.
    pub style: Style,
    /// Role of the messages that describe the world: `user`, or `tool` where the chat template knows that role.
    pub observer: String,
}

/// How much the game says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// Whole sentences, and an explanation of the commands.
    #[default]
    Full,
    /// What is here in a few characters, for models of few tokens: first letters of the ways out, in capitals where
    /// locked, then `k` for each key in sight, `c` for each closed container, `t` for the treasure, and `+` with the keys held.
    Brief,
}

impl Default for TextGameOptions {
    fn default() -> Self {
        Self {
            rooms: [4, 6],
            doors: 1,
            contained: 0.5,
            max_turns: 20,
            progress: 0.5,
            style: Style::Full,
            observer: "user".into(),
        }
    }
}

const ROOMS: [&str; 16] = [
    "hall", "kitchen", "cellar", "library", "attic", "pantry", "study", "chapel", "stable", "workshop", "armoury",
    "garden", "gallery", "dairy", "bakery", "vault",
];
const COLOURS: [&str; 4] = ["red", "blue", "green", "brass"];
const CONTAINERS: [&str; 5] = ["chest", "drawer", "barrel", "basket", "cupboard"];

/// See [`TextGameOptions`].
pub struct TextGame {
    options: TextGameOptions,
    game: Option<Game>,
}

/// A game in progress.
#[derive(Clone)]
struct Game {
    map: Map,
    /// Names of rooms, of the keys' colours, and of the items' containers.
    rooms: Vec<&'static str>,
    colours: Vec<&'static str>,
    containers: Vec<&'static str>,
    state: State,
    /// Moves from the start to the treasure.
    optimum: usize,
    /// Moves from here to the treasure.
    distance: usize,
    turns: usize,
}

impl TextGame {
    /// The environment with these options.
    ///
    /// # Errors
    /// An option with an impossible value, or options that leave so few maps that a split is empty.
    pub fn new(options: TextGameOptions) -> Result<Self, EnvironmentError> {
        let refuse = |reason: String| Err(EnvironmentError { environment: "text_game", reason });
        let [fewest, most] = options.rooms;
        if !(2 <= fewest && fewest <= most && most <= ROOMS.len()) {
            return refuse(format!("rooms is [{fewest}, {most}], expected 2 <= fewest <= most <= {}", ROOMS.len()));
        }
        if options.doors > COLOURS.len() {
            return refuse(format!("doors is {}, expected 0 to {}", options.doors, COLOURS.len()));
        }
        for (name, value) in [("contained", options.contained), ("progress", options.progress)] {
            if !(0.0..=1.0).contains(&value) {
                return refuse(format!("{name} is {value}, expected 0 to 1"));
            }
        }
        if !(1..=1000).contains(&options.max_turns) {
            return refuse(format!("max_turns is {}, expected 1 to 1000", options.max_turns));
        }
        let game = Self { options, game: None };
        if !has_both_splits(|draws| game.draw_map(draws).key()) {
            return refuse("its options leave too few maps to hold some out; allow more rooms".into());
        }
        Ok(game)
    }

    fn draw_map(&self, draws: &mut Draws) -> Map {
        let [fewest, most] = self.options.rooms;
        let rooms = draws.between(fewest as i64, most as i64) as usize;
        let doors = draws.between(0, self.options.doors.min(rooms - 1) as i64) as usize;
        Map::draw(draws, rooms, doors, self.options.contained)
    }

    fn instructions(&self) -> Option<String> {
        let text = "You are playing a text adventure. Find the treasure and take it. Reply with one command and nothing else: \
                    go DIRECTION, take THING, open CONTAINER, unlock DIRECTION, or look.";
        (self.options.style == Style::Full).then(|| text.into())
    }
}

impl Game {
    fn new(map: Map, draws: &mut Draws) -> Self {
        let mut named = |names: &[&'static str], count: usize| {
            let mut names = names.to_vec();
            draws.shuffle(&mut names);
            names.truncate(count);
            names
        };
        let rooms = named(&ROOMS, map.exits.len());
        let colours = named(&COLOURS, map.items.len() - 1);
        let containers = named(&CONTAINERS, map.items.len());
        let state = State::default();
        let optimum = map.solve(state).len();
        Self { map, rooms, colours, containers, state, optimum, distance: optimum, turns: 0 }
    }

    fn item(&self, item: usize) -> String {
        match self.colours.get(item) {
            Some(colour) => format!("{colour} key"),
            None => "treasure".into(),
        }
    }

    /// What the player sees.
    fn describe(&self, style: Style) -> String {
        let (map, state) = (&self.map, self.state);
        let items = 0..map.items.len();
        let ways = Direction::ALL.into_iter().filter_map(|way| Some((way, map.exit(state, way)?)));
        if style == Style::Brief {
            let letter = |(way, (_, locked)): (Direction, (_, bool))| match (way.name().chars().next(), locked) {
                (Some(first), true) => first.to_ascii_uppercase(),
                (first, _) => first.unwrap_or('?'),
            };
            let mut text: String = ways.map(letter).collect();
            for item in items.clone() {
                if map.container(state, item) == Some(false) {
                    text.push('c');
                } else if map.sees(state, item) {
                    text.push(if item == map.treasure() { 't' } else { 'k' });
                }
            }
            let held = items.filter(|&item| map.holds(state, item)).count();
            return text + &"+".repeat(held);
        }
        let mut things = Vec::new();
        for item in items.clone() {
            match map.container(state, item) {
                Some(false) => things.push(format!("a closed {}", self.containers[item])),
                Some(true) if map.sees(state, item) => {
                    things.push(format!("an open {} with the {} inside", self.containers[item], self.item(item)));
                }
                Some(true) => things.push(format!("an empty {}", self.containers[item])),
                None if map.sees(state, item) => things.push(format!("the {}", self.item(item))),
                None => {}
            }
        }
        let ways: Vec<String> = ways
            .map(|(way, (exit, locked))| match exit.key.filter(|_| locked) {
                Some(key) => format!("{} (a locked {} door)", way.name(), self.colours[key]),
                None => way.name().into(),
            })
            .collect();
        let held: Vec<String> = items.filter(|&item| map.holds(state, item)).map(|item| self.item(item)).collect();
        let mut text = format!("You are in the {}. Ways out: {}.", self.rooms[state.room], ways.join(", "));
        if !things.is_empty() {
            text += &format!(" You see {}.", things.join(", "));
        }
        if !held.is_empty() {
            text += &format!(" You carry the {}.", held.join(" and the "));
        }
        text
    }

    /// The command for a move: in the brief style its abbreviation, where that means the same here.
    fn command(&self, step: Move, style: Style) -> String {
        let (text, short) = match step {
            Move::Go(way) => (format!("go {}", way.name()), &way.name()[..1]),
            Move::Take(item) => (format!("take {}", self.item(item)), "t"),
            Move::Open(item) => (format!("open {}", self.containers[item]), "o"),
            Move::Unlock(way) => (format!("unlock {}", way.name()), "u"),
        };
        let same = style == Style::Brief && self.read(short).is_ok_and(|read| read == Some(step));
        if same { short.into() } else { text }
    }

    /// What a command means here: a move, `Ok(None)` to look around, or what is wrong with it.
    fn read(&self, turn: &str) -> Result<Option<Move>, Refusal> {
        let line = turn.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().to_lowercase();
        let words: Vec<&str> = line
            .split(|c: char| !c.is_alphanumeric())
            .filter(|word| !matches!(*word, "" | "the" | "a" | "an" | "to" | "up" | "door" | "with" | "using"))
            .collect();
        let direction = |words: &[&str]| {
            let named = |way: &Direction| words.iter().any(|word| *word == way.name() || *word == &way.name()[..1]);
            Direction::ALL.into_iter().find(named)
        };
        let [verb, rest @ ..] = &words[..] else { return Err(Refusal::Unknown) };
        let is_named = |name: &str| rest.iter().all(|word| name.split(' ').any(|part| part == *word));
        let (map, state) = (&self.map, self.state);
        let mut items = 0..map.items.len();
        match *verb {
            "look" | "l" | "examine" | "inventory" | "i" => Ok(None),
            "go" | "walk" | "move" => direction(rest).map(|way| Some(Move::Go(way))).ok_or(Refusal::Unknown),
            "take" | "t" | "get" | "pick" | "grab" => {
                let found = items.find(|&item| map.sees(state, item) && is_named(&self.item(item)));
                found.map(|item| Some(Move::Take(item))).ok_or(Refusal::Impossible)
            }
            "open" | "o" => {
                let closed = |item: usize| map.container(state, item) == Some(false);
                let found = items.find(|&item| closed(item) && is_named(self.containers[item]));
                found.map(|item| Some(Move::Open(item))).ok_or(Refusal::Impossible)
            }
            "unlock" | "u" => {
                let wanted = direction(rest);
                let mut ways = Direction::ALL.into_iter().filter(|way| wanted.is_none_or(|wanted| wanted == *way));
                let found = ways.find(|way| map.after(state, Move::Unlock(*way)).is_some());
                found.map(|way| Some(Move::Unlock(way))).ok_or(Refusal::Impossible)
            }
            _ if words.len() == 1 => direction(&words).map(|way| Some(Move::Go(way))).ok_or(Refusal::Unknown),
            _ => Err(Refusal::Unknown),
        }
    }
}

/// Why a command does nothing.
enum Refusal {
    /// It is no command.
    Unknown,
    /// It is one, but not here.
    Impossible,
}

impl Environment for TextGame {
    fn name(&self) -> &'static str {
        "text_game"
    }

    fn observer(&self) -> &str {
        &self.options.observer
    }

    fn reset(&mut self, EpisodeId { seed, split, index }: EpisodeId) -> Problem {
        let found = candidates(seed, index).find_map(|mut draws| {
            let map = self.draw_map(&mut draws);
            let key = map.key();
            (split_of(&key) == split).then(|| (key, Game::new(map, &mut draws)))
        });
        let (key, game) = found.expect("both splits hold maps");
        let problem = Problem {
            system: self.instructions(),
            question: game.describe(self.options.style),
            answer: String::new(),
            kind: "text_game",
            key,
        };
        self.game = Some(game);
        problem
    }

    fn step(&mut self, turn: &str) -> Transition {
        let TextGameOptions { max_turns, progress, style, .. } = self.options;
        let Some(game) = &mut self.game else { return Transition::end(0.0, Status::Wrong) };
        game.turns += 1;
        let before = game.distance;
        let (refused, status) = match game.read(turn) {
            Ok(None) => (None, Status::Ok),
            Ok(Some(step)) => match game.map.after(game.state, step) {
                Some(state) => {
                    game.state = state;
                    game.distance = game.map.solve(state).len();
                    (None, Status::Ok)
                }
                None => (Some("You cannot do that here."), Status::Wrong),
            },
            Err(Refusal::Impossible) => (Some("You cannot do that here."), Status::Wrong),
            Err(Refusal::Unknown) => (Some("That is not a command."), Status::Malformed),
        };
        let reward = progress * (before as f64 - game.distance as f64) / game.optimum as f64;
        if game.map.is_won(game.state) {
            self.game = None;
            return Transition::end(reward + 1.0 - progress, Status::Ok);
        }
        let seen = game.describe(style);
        let observation = match (refused, style) {
            (None, _) => seen,
            (Some(_), Style::Brief) => format!("!{seen}"),
            (Some(reason), Style::Full) => format!("{reason} {seen}"),
        };
        let lost = game.turns == max_turns;
        if lost {
            self.game = None;
            return Transition::end(reward, Status::Timeout);
        }
        Transition::next(observation, reward, status)
    }

    fn demonstration(&self) -> Vec<String> {
        let Some(game) = &self.game else { return Vec::new() };
        let mut player = game.clone();
        let mut turns = Vec::new();
        for step in game.map.solve(game.state) {
            turns.push(player.command(step, self.options.style));
            player.state = player.map.after(player.state, step).unwrap_or(player.state);
        }
        turns
    }
}
