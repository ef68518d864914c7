//! JSON Schema of labfiles, made from the types in [`super::file`].

use std::sync::LazyLock;

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::file::File;
use crate::stack;

/// The JSON Schema (draft 2020-12) of a labfile, with lab's own stacks in it.
pub fn schema() -> Value {
    let mut schema = of::<File>();
    let stacks: Map<String, Value> = stack::own_names()
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), stack_schema(&stack::own(name)?.ok()?))))
        .collect();
    if let Some(table) = schema.pointer_mut("/properties/stack").and_then(Value::as_object_mut) {
        table.insert("properties".to_owned(), Value::Object(stacks));
    }
    schema
}

/// What a labfile's structure is checked against: [`schema`] without the stacks, whose options are checked with
/// their definitions.
pub(super) fn structure() -> &'static Value {
    static STRUCTURE: LazyLock<Value> = LazyLock::new(of::<File>);
    &STRUCTURE
}

/// The schema of a type. TOML has no null, so it is taken out of every optional key's type.
pub fn of<T: JsonSchema>() -> Value {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<T>().to_value();
    without_null(&mut schema);
    schema
}

fn without_null(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.values_mut().for_each(without_null);
            if let Some(Value::Array(types)) = object.get_mut("type") {
                types.retain(|kind| kind != "null");
                if let [only] = types.as_slice() {
                    let only = only.clone();
                    object.insert("type".to_owned(), only);
                }
            }
            if object
                .get("default")
                .is_some_and(|value| value.is_null() || value == &json!({}) || value == &json!([]))
            {
                object.remove("default");
            }
            if let Some(Value::Array(choices)) = object.get_mut("anyOf") {
                choices.retain(|choice| choice != &json!({"type": "null"}));
                if let [Value::Object(only)] = choices.as_slice() {
                    let only = only.clone();
                    object.remove("anyOf");
                    object.extend(only);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(without_null),
        _ => {}
    }
}

fn stack_schema(stack: &stack::StackDef) -> Value {
    let sources: Vec<&str> = stack.sources.iter().map(|source| source.name.as_str()).collect();
    let mut properties = Map::new();
    properties.insert(
        "source".to_owned(),
        json!({"type": "string", "enum": sources, "default": sources.first(), "description": "Where the software comes from."}),
    );
    for option in &stack.options {
        let mut schema = json!({"description": option.description});
        if let Some(default) = &option.default {
            schema["default"] = json!(default);
        }
        if !option.values.is_empty() {
            schema["enum"] = json!(option.values);
        }
        properties.insert(option.name.clone(), schema);
    }
    json!({"type": "object", "description": stack.description, "properties": properties, "additionalProperties": false})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_described() {
        let schema = schema();
        assert_eq!(schema["properties"]["name"]["type"], "string");
        assert_eq!(schema["required"], json!(["name"]));
        let node = &schema["$defs"]["NodeTable"];
        assert_eq!(node["properties"]["cpus"]["maximum"], 32);
        assert_eq!(node["properties"]["memory"]["default"], "1GiB");
        assert_eq!(node["additionalProperties"], false);
        for (key, property) in node["properties"].as_object().unwrap() {
            assert!(property["description"].as_str().unwrap().len() > 10, "{key}");
        }
        assert_eq!(
            schema["properties"]["stack"]["properties"]["docker"]["properties"]["source"]["enum"],
            json!(["debian", "upstream"])
        );
        assert!(!schema.to_string().contains("\"null\""), "{schema:#}");
    }
}
