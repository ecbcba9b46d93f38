// SPDX-License-Identifier: Apache-2.0

// Package pages holds the memory pages that pre-copy takes from running
// processes, and puts them together with what CRIU dumped in the barrier into
// images that a plain `criu restore` reads.
//
// While a member runs:
//
//	store, err := pages.NewStore(dir)        // on the file system of the images
//	p := store.Process(nsPid)                // one for each process, named as CRIU names its images
//	p.CopyFrom(ctx, hostPid, written)        // once a round, with what was written since the last
//
// In the barrier, everything frozen, the tracker says for each process which
// pages were not written since its last round (the clean ranges). CRIU, with
// COHORT_CRIU_SKIP_CLEAN=1 in its environment (contrib/criu-preload), leaves
// exactly those out. The tracker is asked before CRIU begins: CRIU itself writes
// to the memory of the processes, and a page that it passed over before it wrote
// there would be in neither. [Process.Missing] says which clean pages the store
// could not read when their turn came; they must be copied now.
//
// Running again:
//
//	store.Sync(ctx)
//	stats, err := pages.Compose(ctx, imagesDir, store, clean)
//
// Compose copies no memory, but for what is small or must be (below). CRIU's
// pagemap-PID.img gets an entry "in parent" for each clean range, and
// imagesDir/parent receives the files of the store by rename. CRIU resolves
// these entries through the directories' chain (criu/pagemap.c,
// read_parent_page):
//
//	imagesDir/pagemap-1.img                  what CRIU wrote, and the clean ranges
//	imagesDir/pages-1.img                    CRIU's, untouched
//	imagesDir/parent/pagemap-1.img           the first round, by address
//	imagesDir/parent/pages-1.img
//	imagesDir/parent/parent/pagemap-1.img    pages that appeared in later rounds
//	imagesDir/parent/parent/pages-1.img
//
// Only the topmost pagemap decides what is restored. A parent may therefore
// hold pages that nobody wants any more: the reader passes over them. Their
// content is removed (a hole in the file), since a process may have had a
// reason to wipe it.
//
// Pages of huge-page mappings cannot come from a parent (criu/mem.c,
// restore_priv_vma_content reads them from the topmost file only); where the
// tracker has such, the process's pages file is written anew with them.
//
// Checkpoints build on others. Dirs are the images of a checkpoint and of those
// before it, the newest first:
//
//	chain, err := pages.OpenChain(dirs)      // before the barrier: it reads all pagemaps
//	p.MissingFrom(chain, clean)              // in the barrier: what neither store nor chain has
//	pages.Compose(ctx, imagesDir, store, clean, pages.WithParent(chain, continuous))
//	pages.Dedupe(ctx, imagesDir, chain)      // whoever was not tracked since: by content
//	pages.Link(dst, dirs)                    // for criu restore: links, no copies
//	pages.Merge(chain)                       // a full checkpoint, to be streamed somewhere
//
// The images of an increment mention the pages of the checkpoint before as "in
// parent", as CRIU does, and have no directory for it: where it is, is the
// caller's to know. Link puts the directories together as CRIU wants them. Shared
// memory (pagemap-shmem-ID.img) goes the same way, but only by content.
//
// What is promised: a page that CRIU wrote wins over the store's. A clean page
// that neither store nor chain holds is an error ([ErrIncomplete]), never a page
// of zeros. A page that was given to the store since the checkpoint before and
// could not be read is not taken from there. Images from a stranger are refused
// where they are not what CRIU writes, and lead nowhere out of their directory.
// A clean range outside of the mappings that CRIU recorded is left out and
// counted. Without effect of the preload library the result is the same, CRIU's
// images are only larger; [Stats].Overlap tells.
//
// What is not done here: finding out what was written (a tracker's task),
// freezing, running CRIU. A restore must not use CRIU's auto-dedup, which
// punches holes into parents while reading them.
//
// Until Compose has returned, the images are not a checkpoint: pages are
// missing in them that no pagemap mentions. Whoever records that a capture is
// complete does so after it.
package pages
