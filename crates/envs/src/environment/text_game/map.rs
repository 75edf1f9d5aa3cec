//! The world of the text game: rooms, doors, things, and the shortest way to the treasure.
//!
//! Rooms form a tree on a grid. A door may be locked; its key lies somewhere that can be reached without it. Keys and the
//! treasure lie in the open or in a closed container. What a state allows is small enough that the distance to the goal is
//! found exactly, by breadth-first search over all states.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write;

use crate::tasks::Draws;

/// A direction to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    North,
    East,
    South,
    West,
}

impl Direction {
    pub const ALL: [Self; 4] = [Self::North, Self::East, Self::South, Self::West];

    pub fn name(self) -> &'static str {
        match self {
            Self::North => "north",
            Self::East => "east",
            Self::South => "south",
            Self::West => "west",
        }
    }

    fn opposite(self) -> Self {
        match self {
            Self::North => Self::South,
            Self::East => Self::West,
            Self::South => Self::North,
            Self::West => Self::East,
        }
    }

    fn from((x, y): (i32, i32), direction: Self) -> (i32, i32) {
        match direction {
            Self::North => (x, y + 1),
            Self::East => (x + 1, y),
            Self::South => (x, y - 1),
            Self::West => (x - 1, y),
        }
    }
}

/// A way out of a room.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    pub room: usize,
    /// The key that the door between needs, if it is locked.
    pub key: Option<usize>,
}

/// Something to take. The keys come first, by number; the treasure is the last.
#[derive(Clone, Copy, Debug)]
pub struct Item {
    pub room: usize,
    /// Whether it lies in a closed container of its own.
    pub contained: bool,
}

/// A map. Names are not part of it.
#[derive(Clone, Debug)]
pub struct Map {
    pub exits: Vec<BTreeMap<Direction, Exit>>,
    pub items: Vec<Item>,
}

/// What has happened so far. Sets are bit masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    pub room: usize,
    /// Items taken.
    pub taken: u8,
    /// Containers opened, by the item inside.
    pub opened: u8,
    /// Doors unlocked, by their key.
    pub unlocked: u8,
}

/// Something to do that changes the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    Go(Direction),
    /// Take an item that lies here.
    Take(usize),
    /// Open the container of an item.
    Open(usize),
    /// Unlock the door of this direction.
    Unlock(Direction),
}

fn has(set: u8, member: usize) -> bool {
    set >> member & 1 == 1
}

impl Map {
    /// A map of `rooms` rooms, `doors` of them behind locked doors; one in `1 / contained` of the things lies in a container.
    ///
    /// Room 0 is the start. `doors` must be below `rooms`.
    pub fn draw(draws: &mut Draws, rooms: usize, doors: usize, contained: f64) -> Self {
        let mut places = vec![(0, 0)];
        let mut exits: Vec<BTreeMap<Direction, Exit>> = vec![BTreeMap::new()];
        let mut parents = vec![0];
        while places.len() < rooms {
            let from = draws.between(0, places.len() as i64 - 1) as usize;
            let direction = *draws.pick(&Direction::ALL);
            let place = Direction::from(places[from], direction);
            if !places.contains(&place) {
                let room = places.len();
                places.push(place);
                parents.push(from);
                exits[from].insert(direction, Exit { room, key: None });
                exits.push(BTreeMap::from([(direction.opposite(), Exit { room: from, key: None })]));
            }
        }
        // A locked door leads into a room from the side of the start; the later the key's number, the later it is needed.
        let mut behind: Vec<usize> = (1..rooms).collect();
        draws.shuffle(&mut behind);
        behind.truncate(doors);
        behind.sort_unstable();
        let mut map = Self { exits, items: Vec::new() };
        for (key, &room) in behind.iter().enumerate() {
            let ways = [parents[room], room];
            for (from, to) in [(ways[0], ways[1]), (ways[1], ways[0])] {
                for exit in map.exits[from].values_mut().filter(|exit| exit.room == to) {
                    exit.key = Some(key);
                }
            }
        }
        let in_container = |draws: &mut Draws| draws.between(0, 999) < (contained * 1000.0) as i64;
        for key in 0..doors {
            // Behind none of the doors that it or a later key opens.
            let reachable = map.reachable(key);
            map.items.push(Item { room: *draws.pick(&reachable), contained: in_container(draws) });
        }
        let away: Vec<usize> = (1..rooms).collect();
        let room = if away.is_empty() { 0 } else { *draws.pick(&away) };
        map.items.push(Item { room, contained: in_container(draws) });
        map
    }

    /// The rooms that can be reached with the keys below `key`.
    fn reachable(&self, key: usize) -> Vec<usize> {
        let mut found = vec![0];
        let mut next = 0;
        while next < found.len() {
            for exit in self.exits[found[next]].values() {
                if exit.key.is_none_or(|needed| needed < key) && !found.contains(&exit.room) {
                    found.push(exit.room);
                }
            }
            next += 1;
        }
        found.sort_unstable();
        found
    }

    /// The treasure among the items.
    pub fn treasure(&self) -> usize {
        self.items.len() - 1
    }

    /// Whether the treasure is taken.
    pub fn is_won(&self, state: State) -> bool {
        has(state.taken, self.treasure())
    }

    /// Whether the player has an item.
    pub fn holds(&self, state: State, item: usize) -> bool {
        has(state.taken, item)
    }

    /// Whether an item can be seen: it is here, not taken, and in no closed container.
    pub fn sees(&self, state: State, item: usize) -> bool {
        let place = self.items[item];
        place.room == state.room && !has(state.taken, item) && (!place.contained || has(state.opened, item))
    }

    /// The container of an item that is here, and whether it is open.
    pub fn container(&self, state: State, item: usize) -> Option<bool> {
        let place = self.items[item];
        (place.contained && place.room == state.room).then(|| has(state.opened, item))
    }

    /// The way in a direction, and whether it is still locked.
    pub fn exit(&self, state: State, direction: Direction) -> Option<(Exit, bool)> {
        let exit = *self.exits[state.room].get(&direction)?;
        Some((exit, exit.key.is_some_and(|key| !has(state.unlocked, key))))
    }

    /// The state after a move, or `None` where the move is not possible.
    pub fn after(&self, state: State, step: Move) -> Option<State> {
        match step {
            Move::Go(direction) => match self.exit(state, direction) {
                Some((exit, false)) => Some(State { room: exit.room, ..state }),
                _ => None,
            },
            Move::Take(item) => self.sees(state, item).then(|| State { taken: state.taken | 1 << item, ..state }),
            Move::Open(item) => match self.container(state, item) {
                Some(false) => Some(State { opened: state.opened | 1 << item, ..state }),
                _ => None,
            },
            Move::Unlock(direction) => match self.exit(state, direction) {
                Some((Exit { key: Some(key), .. }, true)) if has(state.taken, key) => {
                    Some(State { unlocked: state.unlocked | 1 << key, ..state })
                }
                _ => None,
            },
        }
    }

    /// Every move that is possible.
    fn moves(&self, state: State) -> impl Iterator<Item = (Move, State)> {
        let ways = Direction::ALL.into_iter().flat_map(|way| [Move::Go(way), Move::Unlock(way)]);
        let things = (0..self.items.len()).flat_map(|item| [Move::Take(item), Move::Open(item)]);
        ways.chain(things).filter_map(move |step| Some((step, self.after(state, step)?)))
    }

    /// The shortest way to win from a state; empty once it is won. There always is one: nothing that can be done loses
    /// anything.
    pub fn solve(&self, from: State) -> Vec<Move> {
        let mut reached: HashMap<State, Option<(State, Move)>> = HashMap::from([(from, None)]);
        let mut queue = VecDeque::from([from]);
        while let Some(state) = queue.pop_front() {
            if self.is_won(state) {
                let back = |state: &State| reached.get(state).copied().flatten();
                let way = std::iter::successors(back(&state), |(before, _)| back(before));
                let mut moves: Vec<Move> = way.map(|(_, step)| step).collect();
                moves.reverse();
                return moves;
            }
            for (step, next) in self.moves(state) {
                reached.entry(next).or_insert_with(|| {
                    queue.push_back(next);
                    Some((state, step))
                });
            }
        }
        Vec::new()
    }

    /// The map in canonical form: equal for maps that differ in names or in the numbering of their rooms only.
    pub fn key(&self) -> String {
        let mut key = String::new();
        let mut stack = vec![(0, None)];
        while let Some((room, from)) = stack.pop() {
            for item in self.items.iter().enumerate().filter(|(_, item)| item.room == room) {
                let _ = write!(key, "{}{}", item.0, if item.1.contained { "c" } else { "o" });
            }
            for (direction, exit) in self.exits[room].iter().filter(|(_, exit)| Some(exit.room) != from) {
                let _ = write!(key, "{}{};", direction.name(), exit.key.map(|key| key.to_string()).unwrap_or_default());
                stack.push((exit.room, Some(room)));
            }
            key.push('/');
        }
        key
    }
}
