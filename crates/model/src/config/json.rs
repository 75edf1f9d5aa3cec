//! Hugging Face `config.json` in and out.

use serde_json::{Map, Value, json};

use super::{
    Activation, Family, HeadTask, LayerAttention, MAX_LAYERS, ModelConfig, RopeConfig, RopeScaling, ScoreHead, Sizes,
};
use crate::error::{Error, Result};

impl ModelConfig {
    /// Reads the text of a `config.json`.
    pub fn from_json_bytes(bytes: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| Error::malformed("JSON", error))?;
        Self::from_json(&value)
    }

    /// Reads a parsed `config.json`. Absent keys take the defaults of the architecture's class in `transformers`, with two exceptions: the
    /// sizes of the vocabulary, the layers and the context must be there, and heads are not grouped unless the file, or Mistral's class, says
    /// so.
    pub fn from_json(value: &Value) -> Result<Self> {
        let Some(object) = value.as_object() else {
            return Err(Error::malformed("JSON", "expected an object"));
        };
        let keys = Keys { object, prefix: "" };
        let (family, task) = family(&keys)?;
        refuse_variations(&keys, family)?;

        let heads = keys.required_size("num_attention_heads")?;
        let hidden_size = keys.required_size("hidden_size")?;
        let head_dim = match family {
            Family::Qwen3 => 128,
            Family::Gemma3 => 256,
            _ => hidden_size / heads.max(1),
        };
        let sizes = Sizes {
            vocab_size: keys.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.required_size("intermediate_size")?,
            layers: layer_count(&keys)?,
            heads,
            kv_heads: match keys.size("num_key_value_heads")? {
                Some(kv_heads) => kv_heads,
                None if family == Family::Mistral && keys.absent("num_key_value_heads") => 8,
                None => heads,
            },
            head_dim: keys.size("head_dim")?.unwrap_or(head_dim),
            max_positions: keys.required_size("max_position_embeddings")?,
        };
        let mut config = Self::of_family(family, sizes);
        config.tied_head = keys.flag("tie_word_embeddings")?.unwrap_or(family == Family::Gemma3);
        config.activation = activation(&keys, family)?;
        if family == Family::Gemma3 {
            let scalar = keys.number("query_pre_attn_scalar")?.unwrap_or(256.0);
            config.attention_scale = (1.0 / scalar.sqrt()) as f32;
        }
        config.eps = keys.number("rms_norm_eps")?.unwrap_or(1e-6) as f32;
        config.ropes = ropes(&keys, family)?;
        let local = config.ropes.len() - 1;
        config.layers = windows(&keys, family, config.layers.len())?
            .into_iter()
            .map(|window| LayerAttention { window, rope: if window.is_some() { local } else { 0 } })
            .collect();
        config.bos_token_id = keys.token("bos_token_id")?;
        config.eos_token_ids = keys.tokens("eos_token_id")?;
        config.pad_token_id = keys.token("pad_token_id")?;
        let value = keys.flag("value_head")?.unwrap_or(false).then_some(HeadTask::Value);
        if let Some(task) = task.or(value) {
            config.score = Some(ScoreHead { outputs: labels(&keys)?, task });
        }
        config.validate()?;
        Ok(config)
    }

    /// The `eos_token_id` of a `generation_config.json`: none, one or several.
    pub(crate) fn eos_tokens(bytes: &[u8]) -> Result<Vec<u32>> {
        let object = serde_json::from_slice(bytes).map_err(|error| Error::malformed("JSON", error))?;
        Keys { object: &object, prefix: "" }.tokens("eos_token_id")
    }

    /// A `config.json` that [`Self::from_json`] and `transformers` read back as the same model.
    pub fn to_json(&self) -> Value {
        let window = self.layers.iter().find_map(|layer| layer.window);
        let mut object = json!({
            "architectures": [match self.score {
                Some(score) => score.task.architecture(self.family),
                None => self.family.architecture().to_owned(),
            }],
            "model_type": self.family.model_type(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers.len(),
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": decimal(self.eps),
            "tie_word_embeddings": self.tied_head,
            "attention_bias": self.qkv_bias,
            "rope_theta": self.ropes[0].theta,
            "rope_scaling": rope_scaling(&self.ropes[0].scaling),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": match self.eos_token_ids[..] {
                [] => Value::Null,
                [id] => id.into(),
                _ => self.eos_token_ids.clone().into(),
            },
            "pad_token_id": self.pad_token_id,
        });
        let activation = match self.activation {
            Activation::Silu => "silu",
            Activation::GeluTanh => "gelu_pytorch_tanh",
        };
        let layer_types: Vec<&str> = (self.layers.iter())
            .map(|layer| if layer.window.is_some() { "sliding_attention" } else { "full_attention" })
            .collect();
        match self.family {
            Family::Llama => object["hidden_act"] = activation.into(),
            Family::Mistral => {
                object["hidden_act"] = activation.into();
                object["sliding_window"] = window.into();
            }
            Family::Qwen2 | Family::Qwen3 => {
                let full = self.layers.iter().take_while(|layer| layer.window.is_none()).count();
                object["hidden_act"] = activation.into();
                object["use_sliding_window"] = window.is_some().into();
                object["sliding_window"] = window.into();
                object["max_window_layers"] = full.into();
                object["layer_types"] = layer_types.into();
            }
            Family::Gemma3 => {
                object["hidden_activation"] = activation.into();
                object["query_pre_attn_scalar"] = query_scalar(self.attention_scale);
                object["rope_local_base_freq"] = self.ropes[self.ropes.len() - 1].theta.into();
                object["sliding_window"] = window.into();
                object["layer_types"] = layer_types.into();
            }
        }
        if let Some(score) = self.score {
            let names: Vec<String> = (0..score.outputs).map(|label| format!("LABEL_{label}")).collect();
            object["num_labels"] = score.outputs.into();
            object["id2label"] = names.iter().enumerate().map(|(id, name)| (id.to_string(), json!(name))).collect();
            object["label2id"] = names.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
            if score.task == HeadTask::Value {
                object["value_head"] = true.into();
            }
        }
        if matches!(self.family, Family::Qwen2) {
            // transformers knows this family's biases by its name; the key belongs to the others.
            object.as_object_mut().map(|object| object.remove("attention_bias"));
        }
        object
    }
}

/// The number of layers, bounded before a list of them is made.
fn layer_count(keys: &Keys) -> Result<usize> {
    match keys.required_size("num_hidden_layers")? {
        layers @ 1..=MAX_LAYERS => Ok(layers),
        layers => Err(Error::malformed("num_hidden_layers", format!("expected 1 to {MAX_LAYERS}, found {layers}"))),
    }
}

/// The shortest decimal that reads back as the same `f32`.
fn decimal(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// The scalar whose inverse root is `scale`, as an integer where it is one (all released models).
fn query_scalar(scale: f32) -> Value {
    let scalar = 1.0 / f64::from(scale).powi(2);
    let rounded = scalar.round();
    if (1.0 / rounded.sqrt()) as f32 == scale { (rounded as u64).into() } else { scalar.into() }
}

fn rope_scaling(scaling: &RopeScaling) -> Value {
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_max_positions } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_frequency_factor,
            "high_freq_factor": high_frequency_factor,
            "original_max_position_embeddings": original_max_positions,
        }),
    }
}

/// The number of outputs of a score head: of its labels if they are named; transformers takes 2 if nothing is said.
fn labels(keys: &Keys) -> Result<usize> {
    match keys.typed("id2label", "an object", Value::as_object)? {
        Some(labels) => Ok(labels.len()),
        None => Ok(keys.size("num_labels")?.unwrap_or(2)),
    }
}

/// The family, and what its score head is for if the class has one.
fn family(keys: &Keys) -> Result<(Family, Option<HeadTask>)> {
    let supported = || {
        let names: Vec<_> = Family::ALL.iter().map(|family| family.architecture()).collect();
        format!(
            "supported architectures: {}, and their ForSequenceClassification and ForTokenClassification",
            names.join(", ")
        )
    };
    let named = |name: &str| {
        Family::ALL.into_iter().find_map(|family| match family.architecture() == name {
            true => Some((family, None)),
            false => {
                let task = HeadTask::CLASSES.into_iter().find(|task| task.architecture(family) == name);
                task.map(|task| (family, Some(task)))
            }
        })
    };
    if let Some(Value::Array(list)) = keys.object.get("architectures") {
        let names: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
        if !names.is_empty() {
            return (names.iter().find_map(|name| named(name)))
                .ok_or_else(|| Error::unsupported(format!("architecture {}", names.join(", ")), supported()));
        }
    }
    match keys.object.get("model_type").and_then(Value::as_str) {
        Some(name) => (Family::ALL.into_iter().find(|family| family.model_type() == name))
            .map(|family| (family, None))
            .ok_or_else(|| Error::unsupported(format!("model type {name}"), supported())),
        None => Err(Error::malformed("architectures", "missing, and so is model_type")),
    }
}

/// Options that would change the model's outputs and that the decoder does not have.
fn refuse_variations(keys: &Keys, family: Family) -> Result<()> {
    for key in ["attention_bias", "mlp_bias", "use_bidirectional_attention"] {
        let built_in = key == "attention_bias" && family == Family::Qwen2;
        if keys.flag(key)?.unwrap_or(false) && !built_in {
            let hint = format!("{} models with {key} = false can be used", family.architecture());
            return Err(Error::unsupported(format!("{key} = true"), hint));
        }
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = keys.number(key)? {
            return Err(Error::unsupported(format!("{key} = {cap}"), "models without soft-capping can be used"));
        }
    }
    if keys.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(Error::unsupported("partial_rotary_factor", "models that rotate whole heads can be used"));
    }
    if keys.present("quantization_config").is_some() {
        let hint = "use the unquantised safetensors, or a GGUF file";
        return Err(Error::unsupported("quantization_config (quantised safetensors)", hint));
    }
    Ok(())
}

fn activation(keys: &Keys, family: Family) -> Result<Activation> {
    let default = if family == Family::Gemma3 { "gelu_pytorch_tanh" } else { "silu" };
    let name = match keys.text("hidden_activation")? {
        Some(name) => name,
        None => keys.text("hidden_act")?.unwrap_or(default),
    };
    match name {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        _ => Err(Error::unsupported(format!("activation {name}"), "supported activations: silu, gelu_pytorch_tanh")),
    }
}

/// The rotary tables: one, or for Gemma the global one and the local one.
fn ropes(keys: &Keys, family: Family) -> Result<Vec<RopeConfig>> {
    let gemma = family == Family::Gemma3;
    let default_theta = if gemma { 1e6 } else { 1e4 };
    if let Some(parameters) = keys.section("rope_parameters")? {
        if !gemma {
            return Ok(vec![rope(&parameters, default_theta)?]);
        }
        let table = |name, default_theta| match parameters.section(name)? {
            Some(table) => rope(&table, default_theta),
            None => Err(Error::malformed(format!("rope_parameters.{name}"), "missing")),
        };
        return Ok(vec![table("full_attention", default_theta)?, table("sliding_attention", 1e4)?]);
    }
    let theta = keys.number("rope_theta")?.unwrap_or(default_theta);
    let mut ropes = vec![match keys.section("rope_scaling")? {
        Some(scaling) => rope(&scaling, theta)?,
        None => RopeConfig::plain(theta),
    }];
    if gemma {
        ropes.push(RopeConfig::plain(keys.number("rope_local_base_freq")?.unwrap_or(1e4)));
    }
    Ok(ropes)
}

fn rope(keys: &Keys, default_theta: f64) -> Result<RopeConfig> {
    let theta = keys.number("rope_theta")?.unwrap_or(default_theta);
    let name = match keys.text("rope_type")? {
        Some(name) => name,
        None => keys.text("type")?.unwrap_or("default"),
    };
    if keys.number("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(Error::unsupported("partial_rotary_factor", "models that rotate whole heads can be used"));
    }
    let scaling = match name {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: keys.required_number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: keys.required_number("factor")?,
            low_frequency_factor: keys.required_number("low_freq_factor")?,
            high_frequency_factor: keys.required_number("high_freq_factor")?,
            original_max_positions: keys.required_size("original_max_position_embeddings")?,
        },
        _ => return Err(Error::unsupported(format!("rope_type {name}"), "supported types: default, linear, llama3")),
    };
    Ok(RopeConfig { theta, scaling })
}

/// The window of each layer.
fn windows(keys: &Keys, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
    let mut window = keys.size("sliding_window")?;
    if family == Family::Mistral && keys.absent("sliding_window") {
        window = Some(4096);
    }
    if matches!(family, Family::Qwen2 | Family::Qwen3) && !keys.flag("use_sliding_window")?.unwrap_or(false) {
        window = None;
    }
    if let Some(types) = keys.present("layer_types") {
        return layer_windows(types, window, layers);
    }
    let first = match family {
        Family::Llama => layers,
        Family::Mistral => 0,
        Family::Qwen2 | Family::Qwen3 => keys.size("max_window_layers")?.unwrap_or(28),
        Family::Gemma3 => {
            let pattern = keys.size("sliding_window_pattern")?.unwrap_or(6);
            if pattern == 0 {
                return Err(Error::malformed("sliding_window_pattern", "expected a positive number, found 0"));
            }
            let window = window.or(Some(4096));
            return Ok((1..=layers).map(|layer| window.filter(|_| layer % pattern != 0)).collect());
        }
    };
    if family == Family::Llama && window.is_some() {
        let hint = format!("{} models have one", Family::Mistral.architecture());
        return Err(Error::unsupported("sliding_window in LlamaForCausalLM", hint));
    }
    Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect())
}

fn layer_windows(types: &Value, window: Option<usize>, layers: usize) -> Result<Vec<Option<usize>>> {
    let types = types.as_array().filter(|types| types.len() == layers).ok_or_else(|| {
        Error::malformed("layer_types", format!("expected a list of {layers} names, one for each layer"))
    })?;
    let window_of = |(layer, name): (usize, &Value)| match name.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => Err(Error::malformed("sliding_window", "missing, but layer_types call for it")),
        _ => {
            let hint = "supported types: full_attention, sliding_attention";
            Err(Error::unsupported(format!("layer_types[{layer}] = {name}"), hint))
        }
    };
    types.iter().enumerate().map(window_of).collect()
}

/// Typed access to the keys of one JSON object. `null` counts as absent, but for [`Keys::absent`].
struct Keys<'a> {
    object: &'a Map<String, Value>,
    /// In front of the key in messages.
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    fn present(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is not there, not even as `null`, which says none where the class has a default.
    fn absent(&self, key: &str) -> bool {
        !self.object.contains_key(key)
    }

    fn typed<T>(&self, key: &str, expected: &str, view: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        match view(value) {
            Some(typed) => Ok(Some(typed)),
            None => {
                let found: String = value.to_string().chars().take(60).collect();
                Err(Error::malformed(self.place(key), format!("expected {expected}, found {found}")))
            }
        }
    }

    fn place(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn missing(&self, key: &str) -> Error {
        Error::malformed(self.place(key), "missing")
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a non-negative integer", |value| value.as_u64().and_then(|size| usize::try_from(size).ok()))
    }

    fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn required_number(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "a token id", |value| value.as_u64().and_then(|id| u32::try_from(id).ok()))
    }

    fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let tokens = self.typed(key, "a token id or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(id).collect(),
            _ => id(value).map(|id| vec![id]),
        })?;
        Ok(tokens.unwrap_or_default())
    }

    fn section(&self, key: &'static str) -> Result<Option<Keys<'a>>> {
        let object = self.typed(key, "an object", Value::as_object)?;
        let prefix = match key {
            "rope_scaling" => "rope_scaling.",
            "rope_parameters" => "rope_parameters.",
            "full_attention" => "rope_parameters.full_attention.",
            _ => "rope_parameters.sliding_attention.",
        };
        Ok(object.map(|object| Keys { object, prefix }))
    }
}
