//! Numbered slots that keep their memory.
#![forbid(unsafe_code)]

/// Numbered slots that keep their memory.
pub struct Slab<T> {
    items: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub fn new() -> Slab<T> {
        Slab { items: Vec::new(), free: Vec::new() }
    }
    pub fn insert(&mut self, item: T) -> u32 {
        if let Some(index) = self.free.pop() {
            self.items[index as usize] = Some(item);
            return index;
        }
        self.items.push(Some(item));
        // The free list never has to grow on the way back.
        self.free.reserve(self.items.len() - self.free.len());
        (self.items.len() - 1) as u32
    }
    pub fn remove(&mut self, index: u32) -> T {
        let item = self.items[index as usize].take();
        self.free.push(index);
        item.unwrap_or_else(|| panic!("slot {index} of a slab is in use"))
    }
    pub fn get(&mut self, index: u32) -> &mut T {
        match &mut self.items[index as usize] {
            Some(item) => item,
            None => panic!("slot {index} of a slab is in use"),
        }
    }
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.items.iter().enumerate().filter_map(|(i, item)| item.as_ref().map(|t| (i as u32, t)))
    }
}
