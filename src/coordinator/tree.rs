//! The tree along which marks rise and the agreed log descends.
//!
//! Within a host the members form a tree of fan-in `TREE_FAN_IN` under the host's lowest member; these form
//! such a tree across hosts, under member 0. So a host sends one message to another host for all its members,
//! the depth is logarithmic in both, and nobody has more than `2 * TREE_FAN_IN` children.
#![forbid(unsafe_code)]

use crate::limits::TREE_FAN_IN;
use crate::types::Member;
use std::collections::BTreeMap;

/// A member's place in the tree. Its *sources* of marks are itself (source 0) and its children (1, 2, ...).
#[derive(Debug)]
pub struct Tree {
    /// Where marks go; `None` at the root.
    pub parent: Option<Member>,
    /// Where marks come from.
    pub children: Vec<Member>,
    /// For each source, the members that it speaks for, ascending.
    pub subtree: Vec<Vec<Member>>,
    /// For each member of the set, the source that speaks for it; [`OUTSIDE`] if none does.
    source_of: Vec<u8>,
}

/// No source of this node speaks for that member.
const OUTSIDE: u8 = u8::MAX;

const _: () = assert!(2 * TREE_FAN_IN < u32::BITS as usize, "the sources of a node are bits of a u32");

impl Tree {
    /// The place of `me`, given the host of each member.
    #[must_use]
    pub fn new(me: Member, hosts: &[u32]) -> Tree {
        let parents = parents(hosts);
        let children: Vec<Member> =
            (0..hosts.len()).filter(|&i| parents[i] == Some(me.0)).map(|i| Member(i as u32)).collect();
        let mut source_of = vec![OUTSIDE; hosts.len()];
        source_of[me.0 as usize] = 0;
        let mut subtree = vec![Vec::new(); children.len() + 1];
        for member in 0..hosts.len() as u32 {
            // Walk up until a child of mine (or I) is met; depths are logarithmic.
            let (mut at, mut below) = (member, member);
            while at != me.0 {
                below = at;
                match parents[at as usize] {
                    Some(parent) => at = parent,
                    None => break,
                }
            }
            if at != me.0 {
                continue;
            }
            let source =
                if member == me.0 { 0 } else { 1 + children.binary_search(&Member(below)).expect("a child") };
            source_of[member as usize] = source as u8;
            subtree[source].push(Member(member));
        }
        Tree { parent: parents[me.0 as usize].map(Member), children, subtree, source_of }
    }
    /// The source that speaks for a member.
    #[must_use]
    pub fn source_of(&self, member: Member) -> Option<usize> {
        self.source_of.get(member.0 as usize).filter(|&&source| source != OUTSIDE).map(|&s| s as usize)
    }
    /// The source whose marks this member sends; `None` for the parent and for strangers.
    #[must_use]
    pub fn child(&self, member: Member) -> Option<usize> {
        self.children.binary_search(&member).ok().map(|i| i + 1)
    }
}

/// The parent of each member, given the members' hosts; lower than the member.
#[must_use]
pub fn parents(hosts: &[u32]) -> Vec<Option<u32>> {
    let mut place: BTreeMap<u32, usize> = BTreeMap::new();
    let mut members_of: Vec<Vec<u32>> = Vec::new();
    for (member, host) in hosts.iter().enumerate() {
        let host = *place.entry(*host).or_insert_with(|| {
            members_of.push(Vec::new());
            members_of.len() - 1
        });
        members_of[host].push(member as u32);
    }
    let mut parents = vec![None; hosts.len()];
    for (h, members) in members_of.iter().enumerate() {
        parents[members[0] as usize] = (h > 0).then(|| members_of[(h - 1) / TREE_FAN_IN][0]);
        for (i, &member) in members.iter().enumerate().skip(1) {
            parents[member as usize] = Some(members[(i - 1) / TREE_FAN_IN]);
        }
    }
    parents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_member_has_one_parent_and_the_root_speaks_for_all() {
        for hosts in [vec![0], vec![0; 33], (0..40).collect(), (0..100).map(|i| i % 7).collect::<Vec<u32>>()]
        {
            let n = hosts.len();
            let trees: Vec<Tree> = (0..n).map(|i| Tree::new(Member(i as u32), &hosts)).collect();
            assert!(trees[0].parent.is_none());
            assert_eq!(trees[0].subtree.iter().map(Vec::len).sum::<usize>(), n);
            let mut seen = vec![0; n];
            for (i, tree) in trees.iter().enumerate() {
                assert!(tree.children.len() <= 2 * TREE_FAN_IN);
                for (c, child) in tree.children.iter().enumerate() {
                    seen[child.0 as usize] += 1;
                    assert_eq!(trees[child.0 as usize].parent, Some(Member(i as u32)));
                    assert!(tree.subtree[c + 1].contains(child));
                }
            }
            assert_eq!(seen[0], 0);
            assert!(seen[1..].iter().all(|&times| times == 1));
        }
    }

    #[test]
    fn one_member_of_a_host_speaks_to_other_hosts() {
        let hosts: Vec<u32> = (0..64).map(|i| i / 8).collect();
        for i in 0..64u32 {
            let tree = Tree::new(Member(i), &hosts);
            if i % 8 != 0 {
                assert_eq!(hosts[tree.parent.unwrap().0 as usize], hosts[i as usize]);
            }
        }
    }
}
