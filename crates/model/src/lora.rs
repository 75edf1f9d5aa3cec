//! Low-rank adapters (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021): y = W x + s·B A x.
//!
//! Files follow PEFT: its key names, its `adapter_config.json`, its initial values (A Kaiming-uniform with a = √5, which
//! is uniform in ±1/√in; B zero, so that a fresh adapter changes nothing).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{HeadTask, ScoreHead};
use crate::error::{Error, Result};
use crate::save::ADAPTER_CONFIG;
use crate::weights::Tensors;

/// The projections of a layer that can carry an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TargetModule {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// Attention output.
    OProj,
    /// The gate of the MLP.
    GateProj,
    /// The other input projection of the MLP.
    UpProj,
    /// The MLP's output.
    DownProj,
}

impl TargetModule {
    /// All projections, in the order of the layer.
    pub const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// PEFT's (and Hugging Face's) name of the module, such as `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }
}

/// The shape of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the update: the width between A and B.
    #[schemars(range(min = 1, max = 16_384))]
    pub r: usize,
    /// Strength: the update is scaled by `alpha / r` (by `alpha / sqrt(r)` with `use_rslora`).
    pub alpha: f64,
    /// Scale by `alpha / sqrt(r)`, which keeps large ranks learning (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// The projections that get an adapter.
    pub target_modules: Vec<TargetModule>,
    /// The layers that get one, counted from 0 (PEFT's name); every layer when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub layers_to_transform: Option<Vec<usize>>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 16,
            alpha: 32.0,
            use_rslora: false,
            target_modules: TargetModule::ALL.to_vec(),
            layers_to_transform: None,
        }
    }
}

impl LoraConfig {
    /// What B A is multiplied by.
    pub fn scale(&self) -> f32 {
        let r = self.r as f64;
        (self.alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }

    /// Whether a layer gets an adapter.
    pub fn adapts(&self, layer: usize) -> bool {
        self.layers_to_transform.as_ref().is_none_or(|layers| layers.contains(&layer))
    }

    /// The lowest layer that gets an adapter: below it, backward has nothing to do.
    pub fn lowest_layer(&self) -> usize {
        self.layers_to_transform.iter().flatten().copied().min().unwrap_or(0)
    }

    /// Checks that the numbers describe an adapter.
    ///
    /// # Errors
    /// A rank of zero or beyond any use, a strength that is not finite, no target, no layer or the same one twice.
    pub fn validate(&self) -> Result<()> {
        if !(1..=16_384).contains(&self.r) {
            return Err(Error::malformed("lora.r", format!("expected 1 to 16384, found {}", self.r)));
        }
        if !self.alpha.is_finite() {
            return Err(Error::malformed("lora.alpha", format!("expected a finite number, found {}", self.alpha)));
        }
        if self.target_modules.is_empty() {
            return Err(Error::malformed("lora.target_modules", "expected at least one projection, found none"));
        }
        if let Some(layers) = &self.layers_to_transform {
            let repeated = layers.iter().enumerate().find(|(index, layer)| layers[..*index].contains(layer));
            let reason = match repeated {
                _ if layers.is_empty() => {
                    "expected at least one layer, found none; leave it out for every layer".into()
                }
                Some((_, layer)) => format!("expected every layer once, found {layer} twice"),
                None => return Ok(()),
            };
            return Err(Error::malformed(LAYERS, reason));
        }
        Ok(())
    }

    /// Checks that a model of so many layers has those that get an adapter.
    ///
    /// # Errors
    /// The first layer that it lacks.
    pub fn check_layers(&self, count: usize) -> Result<()> {
        match self.layers_to_transform.iter().flatten().find(|layer| **layer >= count) {
            Some(layer) => {
                let last = count.saturating_sub(1);
                Err(Error::malformed(LAYERS, format!("expected layers of the model, 0 to {last}, found {layer}")))
            }
            None => Ok(()),
        }
    }

    /// The text of PEFT's `adapter_config.json`, for an adapter of a model with this score head.
    pub fn to_peft_json(&self, base_model: &str, score: Option<ScoreHead>) -> String {
        let modules: Vec<&str> = self.target_modules.iter().map(|module| module.name()).collect();
        // PEFT trains and saves heads by these names for the two tasks of classification.
        let (task, saved): (_, &[&str]) = match score.map(|score| score.task) {
            None => ("CAUSAL_LM", &[]),
            Some(HeadTask::Value) => ("CAUSAL_LM", &[SCORE]),
            Some(HeadTask::Sequence) => (SEQUENCES, &["classifier", SCORE]),
            Some(HeadTask::Token) => (TOKENS, &["classifier", SCORE]),
        };
        let mut json = serde_json::json!({
            "peft_type": "LORA",
            "task_type": task,
            "base_model_name_or_path": base_model,
            "r": self.r,
            "lora_alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "target_modules": modules,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
        });
        if let Some(layers) = &self.layers_to_transform {
            json["layers_to_transform"] = layers.as_slice().into();
        }
        if !saved.is_empty() {
            json["modules_to_save"] = saved.into();
        }
        format!("{json:#}\n")
    }

    /// Reads PEFT's `adapter_config.json`.
    ///
    /// # Errors
    /// Text that is no such file, and every option that is on and is neither done here nor known to change nothing.
    pub fn from_peft_json(text: &str) -> Result<Self> {
        let json: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(text).map_err(|error| Error::malformed(ADAPTER_CONFIG, error))?;
        let is_off = |value: &serde_json::Value| match value {
            serde_json::Value::Null => true,
            serde_json::Value::Bool(on) => !on,
            serde_json::Value::String(text) => text == "none",
            serde_json::Value::Array(items) => items.is_empty(),
            serde_json::Value::Object(entries) => entries.is_empty(),
            serde_json::Value::Number(_) => false,
        };
        if let Some(kind) = json.get("peft_type").and_then(|kind| kind.as_str()).filter(|kind| *kind != "LORA") {
            return Err(Error::unsupported(
                format!("{ADAPTER_CONFIG}: peft_type {kind}"),
                "only LORA adapters can be read",
            ));
        }
        if let Some(option) = json
            .iter()
            .find(|(key, value)| !KNOWN_OPTIONS.contains(&key.as_str()) && !is_off(value))
            .map(|(key, _)| key)
        {
            return Err(Error::unsupported(format!("{ADAPTER_CONFIG}: {option}"), "plain LoRA adapters can be read"));
        }
        match json.get("init_lora_weights") {
            None | Some(serde_json::Value::Null | serde_json::Value::Bool(_)) => {}
            Some(serde_json::Value::String(name)) if FRESH_VALUES.contains(&name.as_str()) => {}
            Some(other) => {
                let hint = "such adapters belong to a base model changed at their start; save them as plain LoRA adapters with PEFT's `path_initial_model_for_weight_conversion`";
                return Err(Error::unsupported(format!("{ADAPTER_CONFIG}: init_lora_weights {other}"), hint));
            }
        }
        if saved_modules(&json).any(|module| !["classifier", SCORE].contains(&module)) {
            let what = format!("{ADAPTER_CONFIG}: modules_to_save {}", json["modules_to_save"]);
            return Err(Error::unsupported(what, "adapters that save a score head at most can be read"));
        }
        let number = |key: &str| {
            json.get(key)
                .and_then(serde_json::Value::as_f64)
                .ok_or_else(|| Error::malformed(ADAPTER_CONFIG, format!("{key} is no number")))
        };
        let modules = json.get("target_modules").cloned().unwrap_or_default();
        let mut target_modules: Vec<TargetModule> = serde_json::from_value(modules).map_err(|error| {
            Error::unsupported(
                format!("{ADAPTER_CONFIG}: target_modules ({error})"),
                "name any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
            )
        })?;
        target_modules.sort();
        // PEFT writes a list, or one number.
        let layers_to_transform = match json.get("layers_to_transform").filter(|layers| !is_off(layers)).cloned() {
            None => None,
            Some(one @ serde_json::Value::Number(_)) => Some(serde_json::Value::Array(vec![one])),
            Some(layers) => Some(layers),
        };
        let layers_to_transform = layers_to_transform
            .map(serde_json::from_value)
            .transpose()
            .map_err(|error| Error::malformed(ADAPTER_CONFIG, format!("layers_to_transform: {error}")))?;
        let config = Self {
            r: number("r")? as usize,
            alpha: number("lora_alpha")?,
            use_rslora: json.get("use_rslora").is_some_and(|value| value == true),
            target_modules,
            layers_to_transform,
        };
        config.validate()?;
        Ok(config)
    }
}

/// What may be on in PEFT's configuration: options that are read here, and those that change nothing about what a trained adapter
/// computes.
const KNOWN_OPTIONS: [&str; 19] = [
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
];
/// Initial values of PEFT's adapters, by name, that leave the base weights as they are.
const FRESH_VALUES: [&str; 3] = ["gaussian", "eva", "orthogonal"];

const LAYERS: &str = "lora.layers_to_transform";
const SCORE: &str = "score";
const SEQUENCES: &str = "SEQ_CLS";
const TOKENS: &str = "TOKEN_CLS";

fn saved_modules(config: &serde_json::Map<String, serde_json::Value>) -> impl Iterator<Item = &str> {
    let list = config.get("modules_to_save").and_then(serde_json::Value::as_array);
    list.into_iter().flatten().filter_map(serde_json::Value::as_str)
}

/// The score head that is part of an adapter, by its `adapter_config.json` and its tensors.
///
/// # Errors
/// Text that is no such file, a head that is no matrix.
pub fn saved_head(text: &str, tensors: &Tensors) -> Result<Option<ScoreHead>> {
    let json: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(text).map_err(|error| Error::malformed(ADAPTER_CONFIG, error))?;
    let name = format!("{PEFT_PREFIX}{SCORE}.weight");
    let weight = tensors.get(&name).filter(|_| saved_modules(&json).any(|module| module == SCORE));
    let Some(weight) = weight else { return Ok(None) };
    let [outputs, 1..=usize::MAX] = weight.shape[..] else {
        return Err(Error::tensor(name, format!("expected shape [outputs, width], found {:?}", weight.shape)));
    };
    let task = match json.get("task_type").and_then(serde_json::Value::as_str) {
        Some(SEQUENCES) => HeadTask::Sequence,
        Some(TOKENS) => HeadTask::Token,
        _ => HeadTask::Value,
    };
    Ok(Some(ScoreHead { outputs, task }))
}

/// What PEFT puts in front of the name of every module.
pub(crate) const PEFT_PREFIX: &str = "base_model.model.";

/// PEFT's key of an adapter matrix: `module` is the adapted weight's name without `.weight`, `matrix` is `A` or `B`.
pub(crate) fn peft_key(module: &str, matrix: char) -> String {
    format!("{PEFT_PREFIX}{module}.lora_{matrix}.weight")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests stop at the first surprise")]
mod tests {
    use base::Hint;
    use serde_json::json;

    use super::*;
    use crate::weights::Tensor;

    #[test]
    fn peft_config_round_trip() {
        let config = LoraConfig {
            r: 8,
            alpha: 12.0,
            use_rslora: true,
            target_modules: vec![TargetModule::QProj, TargetModule::DownProj],
            layers_to_transform: Some(vec![3, 1]),
        };
        let text = config.to_peft_json("base", None);
        assert_eq!(LoraConfig::from_peft_json(&text).unwrap(), config);
        assert!((config.scale() - 12.0 / 8f32.sqrt()).abs() < 1e-6);
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json["layers_to_transform"] = 3.into();
        let one = LoraConfig::from_peft_json(&json.to_string()).unwrap();
        assert_eq!(one.layers_to_transform, Some(vec![3]), "PEFT takes a single number too");
    }

    #[test]
    fn layers_are_some_each_once_and_of_the_model() {
        let config = |layers: &[usize]| LoraConfig { layers_to_transform: Some(layers.to_vec()), ..Default::default() };
        assert!(config(&[]).validate().unwrap_err().to_string().contains("at least one layer"));
        assert!(config(&[1, 0, 1]).validate().unwrap_err().to_string().contains("found 1 twice"));
        config(&[1, 0]).validate().unwrap();
        config(&[1, 0]).check_layers(2).unwrap();
        assert!(config(&[1, 2]).check_layers(2).unwrap_err().to_string().contains("0 to 1, found 2"));
        LoraConfig::default().check_layers(0).unwrap();
    }

    /// The configuration of the default adapter, changed.
    fn with(keys: serde_json::Value) -> Result<LoraConfig> {
        let text = LoraConfig::default().to_peft_json("base", None);
        let mut json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
        json.extend(keys.as_object().unwrap().clone());
        LoraConfig::from_peft_json(&serde_json::Value::from(json).to_string())
    }

    #[test]
    fn peft_options_that_change_the_result_are_refused() {
        for (keys, expected) in [
            (json!({ "use_dora": true }), "use_dora"),
            (json!({ "bias": "lora_only" }), "bias"),
            (json!({ "lora_bias": true }), "lora_bias"),
            (json!({ "alora_invocation_tokens": [1, 2] }), "alora_invocation_tokens"),
            (json!({ "layer_replication": [[0, 2], [1, 3]] }), "layer_replication"),
            (json!({ "trainable_token_indices": [7] }), "trainable_token_indices"),
            (json!({ "rank_pattern": { "q_proj": 4 } }), "rank_pattern"),
            (json!({ "an_option_to_come": 0.5 }), "an_option_to_come"),
            (json!({ "init_lora_weights": "pissa" }), "init_lora_weights \"pissa\""),
            (json!({ "init_lora_weights": "pissa_niter_16" }), "pissa_niter_16"),
            (json!({ "init_lora_weights": "olora" }), "olora"),
            (json!({ "init_lora_weights": "corda" }), "corda"),
            (json!({ "init_lora_weights": "loftq" }), "loftq"),
            (json!({ "target_modules": ["c_attn"] }), "c_attn"),
        ] {
            let error = with(keys).unwrap_err();
            assert!(error.to_string().contains(expected), "{expected:?} in {error}");
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn peft_options_that_change_nothing_are_read_over() {
        // What PEFT 0.18 writes when nothing but the common options was chosen.
        let defaults = json!({
            "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
            "bias": "none", "corda_config": null, "ensure_weight_tying": false, "eva_config": null,
            "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true,
            "layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {},
            "lora_bias": false, "lora_dropout": 0.05, "megatron_config": null, "megatron_core": "megatron.core",
            "modules_to_save": null, "peft_version": "0.18.0", "qalora_group_size": 16, "rank_pattern": {},
            "revision": null, "target_parameters": null, "trainable_token_indices": null, "use_dora": false,
            "use_qalora": false, "use_rslora": false,
        });
        assert_eq!(with(defaults).unwrap(), LoraConfig::default());
        for keys in [
            json!({ "init_lora_weights": false }),
            json!({ "init_lora_weights": "gaussian" }),
            json!({ "init_lora_weights": "orthogonal" }),
            json!({ "init_lora_weights": "eva", "eva_config": { "rho": 2.0, "tau": 0.99 } }),
            json!({ "exclude_modules": ["vision_tower"], "revision": "main" }),
            json!({ "an_option_to_come": null, "another": false, "a_third": [], "a_fourth": {}, "a_fifth": "none" }),
        ] {
            assert_eq!(with(keys).unwrap(), LoraConfig::default());
        }
    }

    #[test]
    fn a_saved_head_that_is_no_matrix_is_refused() {
        let text = LoraConfig::default().to_peft_json("base", Some(ScoreHead::VALUE));
        for shape in [vec![], vec![1], vec![1, 0], vec![1, 1, 1]] {
            let head = Tensor::new(shape.clone(), vec![0.0; shape.iter().product()]);
            let tensors = Tensors::from([("base_model.model.score.weight".to_owned(), head)]);
            let error = saved_head(&text, &tensors).unwrap_err().to_string();
            assert!(error.contains("score.weight: expected shape [outputs, width]"), "{error}");
        }
    }
}
