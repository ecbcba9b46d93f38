// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/overlay"
)

// MergeInput is what MergeMember makes a full image of.
type MergeInput struct {
	// Member is the image of the increment, its checkpoint has been read.
	Member *Member
	// CheckpointDir is the increment's own .cohort on disk; all but the files *.img of
	// CRIU is taken from it.
	CheckpointDir string
	// Images are CRIU's files *.img of the whole chain as a full checkpoint has them,
	// named relative to the directory of the images.
	Images []File
	// Uppers are the chain's writable layers in overlay format, newest first, and Below
	// the directories of the layers that the chain lies on, likewise.
	Uppers, Below []string
	// Compression of the two new layers; zero is Zstd.
	Compression Compression
}

// MergeMember writes a member's image once more, as that of a full checkpoint: the
// layers below its chain, one writable layer and one checkpoint layer. Epoch and times
// stay the increment's, a restore of either gives the same. Nothing that the increment's
// image refers to is changed, so other epochs of the chain stay restorable.
//
// The caller's context carries a lease until the image has a name. Errors are those
// of BuildMember.
func MergeMember(ctx context.Context, store content.Store, in MergeInput) (MemberImage, error) {
	img, err := mergeMember(ctx, store, in)
	if err != nil {
		return MemberImage{}, fmt.Errorf("merging the checkpoint image of %s: %w", in.Member.Name, err)
	}
	return img, nil
}

func mergeMember(ctx context.Context, store content.Store, in MergeInput) (MemberImage, error) {
	if in.Member.Checkpoint == nil {
		return MemberImage{}, fmt.Errorf("its checkpoint has not been read: %w", errdefs.ErrFailedPrecondition)
	}
	ck := *in.Member.Checkpoint
	ck.Parent, ck.Chain = nil, 1
	ck.normalize()

	below := in.Member.BaseLayers()
	base, err := readBase(ctx, store, in.Member.Manifest, func(i int, _ ocispec.Descriptor) bool { return i < below })
	if err != nil {
		return MemberImage{}, err
	}
	all, err := mergedContents(in, &ck)
	if err != nil {
		return MemberImage{}, err
	}
	rw, err := writeLayer(ctx, store, in.Compression, LayerRW, &ck, func(w io.Writer) error {
		return WriteUpper(ctx, w, in.Uppers, append([]string{}, in.Below...))
	})
	if err != nil {
		return MemberImage{}, err
	}
	if ck.StorageBytes, err = unionBytes(ctx, in.Uppers); err != nil {
		return MemberImage{}, err
	}
	if err := all.document(&ck); err != nil {
		return MemberImage{}, err
	}
	cl, err := writeLayer(ctx, store, in.Compression, LayerCheckpoint, &ck, func(w io.Writer) error {
		return all.write(ctx, w, ck.CutAt)
	})
	if err != nil {
		return MemberImage{}, err
	}
	out, err := base.assemble(ctx, store, &ck, []layer{rw, cl})
	out.ParentChainID = ck.Rootfs.ChainID
	return out, err
}

// mergedContents are the increment's files with the whole chain's images in place
// of its own.
func mergedContents(in MergeInput, ck *Checkpoint) (*contents, error) {
	all, err := listCheckpoint(in.CheckpointDir)
	if err != nil {
		return nil, err
	}
	ours := func(name string) bool { return strings.HasPrefix(name, ImagesDir+"/") }
	// Of the other files there (runc's, statistics) the increment's are the checkpoint's.
	maps.DeleteFunc(all.files, func(name string, _ File) bool {
		return ours(name) && (path.Dir(name) != ImagesDir || strings.HasSuffix(name, imageSuffix))
	})
	all.dirs = slices.DeleteFunc(all.dirs, ours)
	ck.MemoryBytes = 0
	for _, f := range in.Images {
		if f.Size < 0 {
			return nil, fmt.Errorf("%s: size %d: %w", f.Name, f.Size, errdefs.ErrInvalidArgument)
		}
		if strings.HasPrefix(path.Base(f.Name), "pages-") {
			ck.MemoryBytes += uint64(f.Size)
		}
		f.Name = path.Join(ImagesDir, f.Name)
		switch {
		case !ours(f.Name):
			return nil, fmt.Errorf("%s is not below %s: %w", f.Name, ImagesDir, errdefs.ErrInvalidArgument)
		case notInImage[path.Base(f.Name)]:
			continue
		}
		if err := all.add(f); err != nil {
			return nil, err
		}
	}
	if n := len(all.files) + len(all.dirs); n > maxEntries {
		return nil, fmt.Errorf("the merged checkpoint has %d files, readers accept %d: %w", n, maxEntries, errdefs.ErrInvalidArgument)
	}
	return all, nil
}

// document puts a new cohort.json in.
func (c *contents) document(ck *Checkpoint) error {
	if err := ck.Validate(); err != nil {
		return err
	}
	b, err := json.MarshalIndent(ck, "", "  ")
	if err != nil {
		return err
	}
	b = append(b, '\n')
	return c.add(File{Name: CheckpointFile, Size: int64(len(b)), Open: func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b)), nil
	}})
}

// unionBytes is the size of the regular files in a union of writable layers.
func unionBytes(ctx context.Context, uppers []string) (uint64, error) {
	root, done, err := openUnion(uppers)
	if err != nil {
		return 0, err
	}
	defer done()
	links := map[inode]bool{}
	var walk func(d *overlay.Dir) (uint64, error)
	walk = func(d *overlay.Dir) (n uint64, err error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		entries, err := d.Entries()
		if err != nil {
			return 0, err
		}
		for i := range entries {
			e := &entries[i]
			id := inode{e.Stat.Dev, e.Stat.Ino}
			switch {
			case e.IsDir():
				sub, err := d.Sub(e.Name)
				if err != nil {
					return 0, err
				}
				more, err := walk(sub)
				sub.Close()
				if err != nil {
					return 0, err
				}
				n += more
			case e.Whiteout || e.Stat.Mode&unix.S_IFMT != unix.S_IFREG || links[id]:
			default:
				links[id] = e.Stat.Nlink > 1
				n += uint64(max(e.Stat.Size, 0))
			}
		}
		return n, nil
	}
	n, err := walk(root)
	if err != nil {
		return 0, fmt.Errorf("measuring the writable layer: %w", err)
	}
	return n, nil
}
