//! Images: definitions, builder, import, store.
