//! Training methods, one file a family. A family is one [`crate::Method`] with options; the published methods are its
//! [presets](Preset): names for settings of these options.
//!
//! A new method is a new line in the `PRESETS` of its family, or a new file here with a line in [`FAMILIES`]. Help, the
//! pages in docs/methods and `posttrain explain` are made of the presets and of the prologues of the files.

pub mod distillation;
pub mod online_preference;
pub mod policy;
pub mod preference;
pub mod process_reward;
pub mod rejection;
pub mod reward_model;
pub mod sft;
pub mod unlearning;
pub mod unpaired;
pub mod value_model;

/// A published method: a family's options under a name of its own.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// What users call it: the section of a recipe.
    pub name: &'static str,
    /// The name in words.
    pub title: &'static str,
    /// Authors, year and arXiv number.
    pub paper: &'static str,
    /// The loss in plain text; other symbols are explained in the family's page.
    pub formula: &'static str,
    /// TOML of the options that make it this method, laid below what the recipe says.
    pub settings: &'static str,
}

/// Methods that share one implementation.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// The section of a recipe that holds its options.
    pub section: &'static str,
    /// The name in words.
    pub title: &'static str,
    /// The published methods; the first is what the section means when it names none.
    pub presets: &'static [Preset],
    /// Source files whose prologues describe it: the method's own first, then those of its objective.
    sources: &'static [&'static str],
}

impl Family {
    /// What the family's files say of it, as Markdown.
    pub fn prologue(&self) -> String {
        self.sources.iter().map(|source| prologue(source)).collect::<Vec<_>>().join("\n")
    }

    /// The preset of this name.
    pub fn preset(&self, name: &str) -> Option<&'static Preset> {
        self.presets.iter().find(|preset| preset.name == name)
    }
}

/// All families, in the order in which their stages follow each other in a run.
pub const FAMILIES: &[Family] = &[
    Family {
        section: "sft",
        title: "Supervised fine-tuning",
        presets: sft::PRESETS,
        sources: &[include_str!("sft.rs"), include_str!("../../../objectives/src/sft.rs")],
    },
    Family {
        section: "reward_model",
        title: "Reward models",
        presets: reward_model::PRESETS,
        sources: &[
            include_str!("reward_model.rs"),
            include_str!("../../../objectives/src/reward.rs"),
            include_str!("../../../objectives/src/worst_case.rs"),
            include_str!("../../../objectives/src/group_dro.rs"),
            include_str!("../../../objectives/src/odin.rs"),
        ],
    },
    Family {
        section: "process_reward",
        title: "Process reward models",
        presets: process_reward::PRESETS,
        sources: &[include_str!("process_reward.rs"), include_str!("../../../objectives/src/reward.rs")],
    },
    Family {
        section: "value_model",
        title: "Value models for guided decoding",
        presets: value_model::PRESETS,
        sources: &[
            include_str!("value_model.rs"),
            include_str!("../../../rollout/src/guidance/mod.rs"),
            include_str!("../../../rollout/src/guidance/returns.rs"),
            include_str!("../rollouts.rs"),
            include_str!("../../../objectives/src/reward.rs"),
        ],
    },
    Family {
        section: "preference",
        title: "Preference optimisation",
        presets: preference::PRESETS,
        sources: &[
            include_str!("preference.rs"),
            include_str!("../../../objectives/src/preference.rs"),
            include_str!("../../../objectives/src/pairwise.rs"),
            include_str!("../../../objectives/src/negative.rs"),
            include_str!("../../../objectives/src/ranking.rs"),
            include_str!("../../../objectives/src/worst_case.rs"),
            include_str!("../reference.rs"),
        ],
    },
    Family {
        section: "unpaired",
        title: "Preference optimisation from single judgements",
        presets: unpaired::PRESETS,
        sources: &[
            include_str!("unpaired.rs"),
            include_str!("../../../objectives/src/unpaired.rs"),
            include_str!("../density_ratio.rs"),
            include_str!("../../../objectives/src/density_ratio.rs"),
            include_str!("../reference.rs"),
        ],
    },
    Family {
        section: "online_preference",
        title: "Online preference optimisation",
        presets: online_preference::PRESETS,
        sources: &[
            include_str!("online_preference.rs"),
            include_str!("../rollouts.rs"),
            include_str!("../../../objectives/src/online.rs"),
            include_str!("../../../objectives/src/preference.rs"),
            include_str!("../../../objectives/src/pairwise.rs"),
        ],
    },
    Family {
        section: "policy",
        title: "Policy gradients",
        presets: policy::PRESETS,
        sources: &[
            include_str!("policy/mod.rs"),
            include_str!("../rollouts.rs"),
            include_str!("../../../objectives/src/policy.rs"),
            include_str!("../../../objectives/src/advantage.rs"),
            include_str!("../../../objectives/src/turns.rs"),
            include_str!("../../../objectives/src/gae.rs"),
            include_str!("../../../objectives/src/shaping.rs"),
            include_str!("../../../objectives/src/ratio.rs"),
            include_str!("../../../objectives/src/clip.rs"),
            include_str!("../../../objectives/src/negative.rs"),
            include_str!("../../../objectives/src/correction.rs"),
            include_str!("../../../objectives/src/filter.rs"),
            include_str!("../../../objectives/src/aggregation.rs"),
            include_str!("../../../objectives/src/kl.rs"),
            include_str!("../../../objectives/src/value.rs"),
        ],
    },
    Family {
        section: "rejection",
        title: "Rejection sampling",
        presets: rejection::PRESETS,
        sources: &[
            include_str!("rejection.rs"),
            include_str!("../rollouts.rs"),
            include_str!("../../../objectives/src/sft.rs"),
        ],
    },
    Family {
        section: "distillation",
        title: "Distillation",
        presets: distillation::PRESETS,
        sources: &[
            include_str!("distillation.rs"),
            include_str!("../rollouts.rs"),
            include_str!("../../../objectives/src/distillation.rs"),
            include_str!("../../../objectives/src/aggregation.rs"),
        ],
    },
    Family {
        section: "unlearning",
        title: "Unlearning",
        presets: unlearning::PRESETS,
        sources: &[include_str!("unlearning.rs"), include_str!("../../../objectives/src/unlearning.rs")],
    },
];

/// The family and the preset behind a name a user may write: that of a method, or of a section.
pub fn find(name: &str) -> Option<(&'static Family, &'static Preset)> {
    let named = |family: &'static Family| Some((family, family.preset(name)?));
    FAMILIES.iter().find_map(named).or_else(|| {
        let family = FAMILIES.iter().find(|family| family.section == name)?;
        Some((family, family.presets.first()?))
    })
}

/// The module documentation at the head of a source file, without the link marks that only rustdoc understands.
fn prologue(source: &str) -> String {
    let lines = source.lines().map_while(|line| line.strip_prefix("//!"));
    let text: String = lines.map(|line| line.strip_prefix(' ').unwrap_or(line).to_owned() + "\n").collect();
    plain_links(&text)
}

/// Turns ``[`name`]`` and ``[`name`](path)`` into `` `name` ``.
fn plain_links(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, link)) = rest.split_once("[`") {
        let Some((name, after)) = link.split_once("`]") else { break };
        plain += before;
        plain += &format!("`{}`", name.rsplit(['@', ':']).next().unwrap_or(name));
        rest = match after.strip_prefix('(').and_then(|target| target.split_once(')')) {
            Some((_, after)) => after,
            None => after,
        };
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_name_is_of_one_method() {
        let mut names = BTreeSet::new();
        for family in FAMILIES {
            assert!(!family.presets.is_empty(), "{} has no method", family.section);
            for preset in family.presets {
                assert!(names.insert(preset.name), "{} is the name of two methods", preset.name);
                assert!(
                    FAMILIES.iter().all(|other| other.section == family.section || other.section != preset.name),
                    "{} is a method of {} and another section",
                    preset.name,
                    family.section
                );
                assert_eq!(find(preset.name).map(|(_, preset)| preset.name), Some(preset.name));
                for text in [preset.title, preset.paper, preset.formula] {
                    assert!(!text.is_empty(), "{} says too little", preset.name);
                }
            }
        }
    }

    #[test]
    fn prologues_read_as_markdown() {
        assert_eq!(
            prologue("//! A [`Thing`] of [`mod@other::part`](x).\n//!\n//! ok\n\nuse x;\n"),
            "A `Thing` of `part`.\n\nok\n"
        );
        assert_eq!(plain_links("[a](b) [`c"), "[a](b) [`c");
        for family in FAMILIES {
            assert!(family.prologue().len() > 200 && !family.prologue().contains("[`"), "{}", family.section);
        }
    }
}
